"""Write docs/faithfulness.md: how closely our modules reproduce each record of the original code.

    python -m tests.faithfulness

Runs the tests that load a record and collects the errors of their comparisons (`golden.assert_close_to_max`). Checks
that arrays are bitwise equal do not count as comparisons.
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
# Record (a name in tests/golden) -> what it contains, as in the table
RECORDS = {
    "convnext_mask": "masked ConvNeXt, outputs and all gradients",
    "convnext_nomask": "the same without a mask",
    "fpn_vs01": "FPN of `camera-0.1` (four levels)",
    "custom_fpn_single": "FPN of `camera-0.075` (one level)",
    "depth_net_aspp": "complex depth head (ASPP)",
    "view_trans_2lvl": "view transform `gather` (UVTR's sampling), over two levels",
    "voxel_pool_depth": "view transform `pool` (LSS's pooling), depth targets and loss",
    "voxelize_vfe": "voxels and their features",
    "sparse_encoder_eval": "sparse encoder (spconv 1 weights)",
    "sparse_encoder_mask_eval": "the same with masked blocks",
    "second3d_fpn_eval": "dense neck of the LiDAR encoder",
    "sample_rays_default": "ray selection and targets",
    "render_collider": "near and far ends of rays in the volume",
    "render_samplers": "stratified and importance samples",
    "render_sdf_field": "SDF, its gradient, color; all gradients",
    "render_neus_eval": "NeuS: renderings, losses, all gradients",
    "render_volsdf_eval": "VolSDF: the same",
    "render_unisurf_sampler": "UniSurf's samples",
    "render_head_viewtrans_train": "a training step of the render head",
    "uvtr_head_eval": "detection head: a training step and its boxes",
    "uvtr_dn_head_train": "denoising detection head: a training step",
    "det_box_utils": "box codes, IoU, assignment, NMS",
    "grid_mask": "GridMask augmentation of images",
    "spunet_eval": "SpUNet of segmentation (spconv 2 weights)",
}
HEAD = """# Faithfulness

`tests/golden` holds records of the original code: inputs, weights, outputs and gradients (fp32, CPU, reduced sizes,
random weights). Our modules reproduce each record with its weights, converted by `unipad.convert`. An error is the
largest absolute difference of an array, gradients included, as a fraction of its largest entry. Tolerances differ, so
the last column has the largest ratio of an error to its tolerance. Arrays of indices, masks and labels, and all
arrays of records marked "equal", are bitwise equal. Written by `python -m tests.faithfulness`.

| record | contents | comparisons | median error | largest error | of tolerance |
|---|---|---|---|---|---|
"""


class Collector:
    """A pytest plugin: selects the tests that load a record, and collects the errors of their comparisons.

    A comparison counts for the record that the test loaded last.
    """

    def __init__(self):
        self.errors = defaultdict(list)  # record -> (error, tolerance) of each comparison

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if loads_a_record(item.function)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        golden.log = log = []
        try:
            return (yield)
        finally:
            golden.log, record = None, None
            for entry in log:
                if isinstance(entry, str):
                    record = entry
                    self.errors[record]  # creates the entry: all arrays of a record may be bitwise equal
                elif record is not None:
                    self.errors[record].append(entry)


def loads_a_record(function):
    """Whether a test calls `golden.load`, directly or through functions of its module."""
    functions = dict(inspect.getmembers(sys.modules[function.__module__], inspect.isfunction))
    sources = {n: inspect.getsource(f) for n, f in functions.items() if f.__module__ == function.__module__}
    loading = {"load"}
    while more := {n for n, source in sources.items() if n not in loading and _calls(source, loading)}:
        loading |= more
    return function.__name__ in loading


def _calls(source, names):
    """Whether a source text calls one of these functions, with or without a module in front, except `torch.load`."""
    return any(re.search(rf"(?<!torch\.)(?<!def )\b{name}\(", source) for name in names)


def table(errors):
    """The text of docs/faithfulness.md. errors: as `Collector.errors`."""
    rows = []
    for record, contents in RECORDS.items():
        if not errors[record]:
            rows.append(f"| `{record}` | {contents} | | equal | equal | |")
            continue
        ascending = sorted(error for error, _ in errors[record])
        median, largest = ascending[len(ascending) // 2], ascending[-1]
        of_tolerance = max(error / tolerance for error, tolerance in errors[record])
        rows.append(
            f"| `{record}` | {contents} | {len(ascending)} | {median:.1e} | {largest:.1e} | {of_tolerance:.0%} |"
        )
    return HEAD + "\n".join(rows) + "\n"


def main():
    files = sorted(file for file in (REPO / "tests").rglob("test_*.py") if _calls(file.read_text(), {"load"}))
    collector = Collector()
    # "-n 0": all tests in this process, so that one collector sees them
    exit_code = pytest.main(["-n", "0", "-q", "-p", "no:cacheprovider", *map(str, files)], plugins=[collector])
    absent = RECORDS.keys() - collector.errors.keys()
    if exit_code or absent:
        sys.exit(f"{TABLE} is unchanged: " + (f"no test loads {', '.join(absent)}" if absent else "tests failed"))
    TABLE.write_text(table(collector.errors))


if __name__ == "__main__":
    main()
