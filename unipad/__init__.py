"""UniPAD: self-supervised pre-training for autonomous driving by neural rendering.

config.py      all settings, as frozen dataclasses
config_dict.py settings as dictionaries for files, and back
recipes/       presets: the paper's, the released configs', tiny ones
batch.py       the batch: the interface between data and model
boxes.py       box geometry, for data and model
errors.py      errors for users: one sentence that says what is wrong and what to do
runtime.py     device, processes, random numbers, stopping on a signal
exit.py        how a program ends: exit codes, and one line instead of a traceback
run_folder.py  the folder, log and checkpoints of a training run
progress.py    what a training loop prints and logs, and how it ends if it diverges
checkpoint.py  checkpoint files: writing, reading, taking weights from them
convert.py     checkpoints of the original (the authors' code) <-> ours, ImageNet's ConvNeXt -> ours
export.py      encoders for other code: as modules, as weights for networks of other projects
names.py       parameter names: the original's <-> ours, ours -> other projects'
optimizer.py   AdamW and its schedules
cli.py         command lines: a script's flags and every setting of the recipe
data/          datasets read into batches, and the synthetic city
model/         encoders, volumes, rays, renderer, heads
evaluate/      metrics: PSNR and depth errors, NDS and mAP, mIoU, RayIoU
draw/          pictures, videos, meshes, the 3D view of TensorBoard
selfcheck/     every op of kernels/ compared with its reference in fp64
spconv/        sparse convolutions, with spconv's interface; imports only kernels/
kernels/       the ops; in a checkout, `unipad.kernels` is the folder kernels/ next to unipad/, see below
"""

from pathlib import Path

# `unipad.kernels` is unipad/kernels/ once installed, but kernels/ next to unipad/ in a checkout: there, this package's
# search path gets the checkout's root. `kernels` is not installed top-level: another distribution has that name.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
