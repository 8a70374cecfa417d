"""Output voxels of strided and transposed convolutions. tests/test_compiles.py checks LAUNCHES."""

from contextlib import nullcontext

import pytest
import torch

from tests.ahead_of_time import Launch
from tests.kernels.test_voxel_keys import SPARSE, random_voxels
from unipad.kernels.backend import references
from unipad.kernels.sparse_map import strided_map, strided_map_ref, transposed_map, transposed_map_ref
from unipad.kernels.sparse_outputs import (
    BLOCK,
    BLOCK_PAIRS,
    out_shape,
    output_coords,
    output_keys,
    transposed_out_shape,
)
from unipad.kernels.voxel_keys import NO_KEY, NO_KEY_SHORT, voxel_keys_ref

TYPES = dict.fromkeys(["slots", "kernel_size", "stride", "padding", "dilation"], ("i32",) * 3)
TYPES |= dict(coords_ptr="*i32", long_keys_ptr="*i64")
LONG, SHORT = TYPES | dict(keys_ptr="*i64"), TYPES | dict(keys_ptr="*i32")  # types with 64-bit and 32-bit keys
COORDS_BLOCK, KEYS_BLOCK = dict(BLOCK=BLOCK), dict(BLOCK_PAIRS=BLOCK_PAIRS)
# the inverse table of a 3 x 3 x 3 convolution of stride 2: 27 entries for the 8 cells that an input reaches
FILL, NO_FILL = dict(FILLS=4), dict(FILLS=1, inverse_idx_ptr=None)
ONE_CELL = dict(slots=(1, 1, 1), kernel_size=(1, 1, 1), dilation=(1, 1, 1), FILLS=1, TRANSPOSED=False, NO_KEY=NO_KEY)
LAUNCHES = [
    # elements: no argument has the element type, so one is enough
    Launch(kernel, flags, types, elements=("fp32",), registers=registers, shared=shared)
    for kernel, flags, types, registers, shared in [
        ("_reached_keys_kernel", KEYS_BLOCK | NO_FILL | dict(TRANSPOSED=False, NO_KEY=NO_KEY), LONG, 112, 0),
        ("_reached_keys_kernel", KEYS_BLOCK | FILL | dict(TRANSPOSED=False, NO_KEY=NO_KEY_SHORT), SHORT, 120, 0),
        # a kernel of one cell: Triton makes sizes of 1 Python numbers
        ("_reached_keys_kernel", KEYS_BLOCK | FILL | ONE_CELL, LONG, 112, 4096),
        ("_reached_keys_kernel", KEYS_BLOCK | NO_FILL | dict(TRANSPOSED=True, NO_KEY=NO_KEY), LONG, 112, 0),
        ("_reached_keys_kernel", KEYS_BLOCK | NO_FILL | dict(TRANSPOSED=True, NO_KEY=NO_KEY_SHORT), SHORT, 112, 0),
        ("_coords_kernel", COORDS_BLOCK | dict(long_keys_ptr=None), LONG, 40, 1024),
        ("_coords_kernel", COORDS_BLOCK, SHORT, 40, 1024),
    ]
]

ONE = (1, 1, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch_size_known", [True, False])
def test_outputs_match_the_reference(transposed, batch_size_known, device):
    """Keys have 32 bits if the batch size is known and the grid small, as it is here."""
    B, shape, N = SPARSE
    geometry = (2, 3, 4), (3, 1, 2), (1, 0, 2), (2, 3, 1)  # kernel, stride, padding, dilation: different on every axis
    coords = random_voxels(B, shape, N, device)
    map_ref, size_of = (transposed_map_ref, transposed_out_shape) if transposed else (strided_map_ref, out_shape)
    expected, grid = map_ref(coords, shape, *geometry)[0], size_of(shape, *geometry)
    keys = output_keys(coords, grid, geometry, B if batch_size_known else None, transposed)
    assert keys.dtype == (torch.int32 if batch_size_known else torch.int64)
    assert torch.equal(keys.long(), voxel_keys_ref(expected, grid))
    out_coords, long_keys = output_coords(keys, grid)
    assert torch.equal(out_coords, expected) and torch.equal(long_keys, keys.long())


@pytest.mark.parametrize("context", [nullcontext, references], ids=["kernels", "references"])
def test_convolutions_without_output_or_stride_are_rejected(context, device):
    """A grid smaller than the kernel; a transposed convolution whose padding crops all outputs; a stride of 0."""
    coords = random_voxels(1, (2, 5, 5), 9, device)
    for fn, kernel, stride, padding, message in [
        (strided_map, (3, 3, 3), ONE, (0, 0, 0), "kernel 3, .* has no output along z, where the grid has 2 cells"),
        (transposed_map, (2, 2, 1), ONE, (0, 0, 3), "kernel 1, .* has no output along x, where the grid has 5 cells"),
        (strided_map, (3, 3, 3), (2, 0, 2), ONE, "no convolution along y has kernel 3, stride 0"),
    ]:
        with pytest.raises(ValueError, match=message), context():
            fn(coords, (2, 5, 5), kernel, stride, padding, ONE)
