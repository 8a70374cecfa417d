"""UniPAD: self-supervised pre-training for autonomous driving by neural rendering.

config.py      every setting as frozen dataclasses
recipes.py     their values: the paper's, the released configs', tiny ones
batch.py       what the data hands to the model
errors.py      what the user can mend, in one sentence
runtime.py     device, processes, random numbers, run folder
checkpoint.py  checkpoints, and taking weights out of one
convert.py     weights of UniPAD and of ImageNet to ours, and ours to UniPAD's
names.py       what they are called there and here
optimizer.py   AdamW and its schedules
data/          nuScenes and the synthetic city, read into batches
model/         encoders, volumes, rays, renderer, detection heads
evaluate/      how good a model is: PSNR and depth errors, NDS and mAP
draw/          what a person looks at: pictures, films, meshes
selfcheck/     every op compared with its reference in fp64
"""

from pathlib import Path

# In a checkout `unipad.kernels` is the folder beside this one. It is no package of its own, since another distribution
# has that name.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
