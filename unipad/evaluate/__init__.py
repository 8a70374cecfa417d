"""Evaluation: predictions for a split, and their metrics.

frames.py        predictions for every frame of a split, over all processes
rendering.py     PSNR of colors, errors of depths
detection.py     boxes of a whole split, scored by the devkit
submission.py    boxes -> results_nusc.json -> the devkit's metrics
segmentation.py  classes of the points of a whole split -> files -> the devkit's metrics
occupancy.py     classes of the voxels of a whole split -> files and the benchmark's mIoU
rayiou.py        RayIoU: what rays through the voxels hit first
tta.py           test-time augmentation: predictions for rotated, scaled and flipped copies of a batch, merged
"""
