"""UniPAD: self-supervised pre-training for autonomous driving by neural rendering.

config.py    every setting as frozen dataclasses; the recipes of the paper as PRESETS
batch.py     what the data hands to the model
runtime.py   device, processes, random numbers, run folder, checkpoints
convert.py   weights of UniPAD and of ImageNet to ours, and ours to UniPAD's
names.py     what they are called there and here
evaluate.py  how good a model is: PSNR and depth errors, NDS and mAP
submission.py  detections -> results_nusc.json -> the devkit's metrics
draw.py      pictures of real beside rendered
data/        nuScenes and the synthetic city, read into batches
model/       encoders, volumes, rays, renderer
"""
