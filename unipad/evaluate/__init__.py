"""How good a model is.

frames.py        what a model says of every frame of a split
rendering.py     PSNR of colors, errors of depths
detection.py     boxes of a whole split, judged by the devkit
submission.py    boxes -> results_nusc.json -> the devkit's metrics
segmentation.py  points of a whole split -> files of classes -> the devkit's metrics
tta.py           one batch in many looks: turned, scaled, mirrored, and merged
"""
