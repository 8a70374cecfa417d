"""UniPAD: self-supervised pre-training for autonomous driving by neural rendering.

config.py      every setting as frozen dataclasses
recipes.py     their values: the paper's, the released configs', tiny ones
batch.py       what the data hands to the model
errors.py      what the user can mend, in one sentence
runtime.py     device, processes, random numbers, run folder
checkpoint.py  checkpoints, and taking weights out of one
convert.py     weights of UniPAD and of ImageNet to ours, and ours to UniPAD's
names.py       what they are called there and here
optimiser.py   AdamW and its schedules
evaluate.py    how good a model is: PSNR and depth errors, NDS and mAP
tta.py         what is found in a turned, scaled, mirrored batch, merged
submission.py  detections -> results_nusc.json -> the devkit's metrics
draw.py        pictures of real beside rendered
draw_boxes.py  pictures of boxes, from above and in the cameras
mesh.py        the surface that a model renders, as a PLY file
data/          nuScenes and the synthetic city, read into batches
model/         encoders, volumes, rays, renderer, detection heads
"""
