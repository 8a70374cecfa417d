"""Writes docs/faithfulness.md: how far from the original's numbers every record of it is reproduced.

    python -m tests.faithfulness

Runs the tests that load a record, and notes what they compare. An error is the largest difference of an array over its
largest entry; what must be equal to the last bit is not among them.
"""

import inspect
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests import golden

REPO = Path(__file__).parent.parent
TABLE = REPO / "docs" / "faithfulness.md"
# Record -> what of the original it holds
RECORDS = {
    "convnext_mask": "masked ConvNeXt, outputs and all gradients",
    "convnext_nomask": "the same without a mask",
    "fpn_vs01": "FPN of the ablation's camera",
    "custom_fpn_single": "FPN of the final camera",
    "depth_net_aspp": "complex depth head",
    "view_trans_2lvl": "gather view transform over two levels",
    "voxel_pool_depth": "pooling view transform, depth targets and loss",
    "voxelize_vfe": "voxels and their features",
    "sparse_encoder_eval": "sparse encoder (spconv 1 weights)",
    "sparse_encoder_mask_eval": "the same under a mask of blocks",
    "second3d_fpn_eval": "dense neck of the LiDAR encoder",
    "sample_rays_default": "choice of rays and their targets",
    "render_collider": "where rays enter and leave the volume",
    "render_samplers": "stratified and importance samples",
    "render_sdf_field": "distance, its gradient, color; all gradients",
    "render_neus_eval": "NeuS: renderings, losses, all gradients",
    "render_volsdf_eval": "VolSDF: the same",
    "render_unisurf_sampler": "UniSurf's samples",
    "render_head_viewtrans_train": "a training step of the render head",
    "uvtr_head_eval": "plain detection head: a step, boxes",
    "uvtr_dn_head_train": "denoising detection head: a step",
    "det_box_utils": "box codes, IoU, assignment, suppression",
    "grid_mask": "grid mask of the images",
    "spunet_eval": "sparse U-Net of segmentation (spconv 2 weights)",
}
HEAD = """# Faithfulness

Every record of the original code (fp32, CPU, reduced sizes, random weights; `tests/golden`) is reproduced with the
recorded weights, brought over by `unipad.convert`. An error is the largest difference over the largest entry of an
array, gradients among them; tolerances differ, so the last column says how much of its own the nearest comparison uses.
Arrays of indices, masks and labels, and those of records without a number, are equal to the last bit. Written by
`python -m tests.faithfulness`.

| record | what | compared | median error | largest error | of its tolerance, at most |
|---|---|---|---|---|---|
"""


class Watcher:
    """A pytest plugin: keeps the tests that load a record, and collects what they compare."""

    def __init__(self):
        self.errors = defaultdict(list)  # record -> (error, tolerance) of each comparison

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if loads_a_record(item.function)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        golden.watched = seen = []
        try:
            return (yield)
        finally:
            golden.watched, record = None, None
            for what in seen:
                if isinstance(what, str):
                    record = what
                    self.errors[record]  # a record all of whose arrays are equal is one, too
                elif record is not None:
                    self.errors[record].append(what)


def loads_a_record(function):
    """Whether a test calls `golden.load`, by itself or through functions of its module."""
    functions = dict(inspect.getmembers(sys.modules[function.__module__], inspect.isfunction))
    functions = {n: inspect.getsource(f) for n, f in functions.items() if f.__module__ == function.__module__}
    loading = {"load"}
    while more := {n for n, text in functions.items() if n not in loading and _calls(text, loading)}:
        loading |= more
    return function.__name__ in loading


def _calls(text, names):
    return any(re.search(rf"(?<!torch\.)(?<!def )\b{name}\(", text) for name in names)


def table(errors):
    """The page: `errors` as `Watcher` has them."""
    rows = []
    for record, what in RECORDS.items():
        if not errors[record]:
            rows.append(f"| `{record}` | {what} | | equal | equal | |")
            continue
        found = sorted(error for error, _ in errors[record])
        used = max(error / tolerance for error, tolerance in errors[record])
        rows.append(
            f"| `{record}` | {what} | {len(found)} | {found[len(found) // 2]:.1e} | {found[-1]:.1e} | {used:.0%} |"
        )
    return HEAD + "\n".join(rows) + "\n"


def main():
    files = sorted(file for file in (REPO / "tests").rglob("test_*.py") if _calls(file.read_text(), {"load"}))
    watcher = Watcher()
    code = pytest.main(["-n", "0", "-q", "-p", "no:cacheprovider", *map(str, files)], plugins=[watcher])
    absent = RECORDS.keys() - watcher.errors.keys()
    if code or absent:
        sys.exit(f"{TABLE} stays as it was: " + (f"no test loads {', '.join(absent)}" if absent else "tests failed"))
    TABLE.write_text(table(watcher.errors))


if __name__ == "__main__":
    main()
