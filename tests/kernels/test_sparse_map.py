"""Neighbor tables: kernels compared with references, references with dense convolutions.

tests/test_compiles.py checks LAUNCHES.
"""

from itertools import product
from math import prod

import pytest
import torch
import torch.nn.functional as F

from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from tests.kernels.test_voxel_keys import FULL, SETS, SPARSE, random_voxels
from unipad.kernels.sparse_map import (
    BLOCK,
    inverse_map,
    inverse_map_ref,
    strided_map,
    strided_map_ref,
    strided_tables,
    strided_tables_ref,
    submanifold_map,
    submanifold_map_ref,
    transposed_map,
    transposed_map_ref,
)
from unipad.kernels.sparse_outputs import out_shape, transposed_out_shape
from unipad.kernels.voxel_keys import NO_KEY, NO_KEY_SHORT, sort_voxels, sort_voxels_ref

TYPES = dict.fromkeys(["stride", "padding"], ("i32",) * 3)
TYPES |= dict(coords_ptr="*i32", order_ptr="*i64", reader_order_ptr="*i64")
NO_INVERSE = dict(inverse_idx_ptr=None)
LONG, SHORT = TYPES | dict(keys_ptr="*i64"), TYPES | dict(keys_ptr="*i32")  # types with 64-bit and 32-bit keys
LONG_KEYS, SHORT_KEYS = (dict(BLOCK=BLOCK, NO_KEY=no_key) for no_key in (NO_KEY, NO_KEY_SHORT))
# Readers (voxels that look up neighbors), and the voxels they read, are sorted by key
SORTED = dict(reader_order_ptr=None, order_ptr=None)
# Triton makes constants of integer arguments that are 1, except those in the kernel's `@jit(varying=...)`: of SIZES, it
# can do so only with KY, DZ and DY. One launch has all of them as constants, which never occurs: the extreme case.
SIZES = ["M", "N", "Z", "Y", "X", "KY", "DZ", "DY", "STEPS"]
LAUNCHES = [
    # elements: no argument has the element type, so one is enough
    Launch(kernel, flags, types, elements=("fp32",), registers=registers, shared=shared)
    for kernel, flags, types, registers, shared in [
        ("_neighbors_kernel", LONG_KEYS | dict(KX=1, DX=1) | NO_INVERSE, LONG, 48, 2048),
        ("_neighbors_kernel", LONG_KEYS | dict(KX=3, DX=1) | NO_INVERSE, LONG, 48, 2048),
        ("_neighbors_kernel", LONG_KEYS | dict(KX=5, DX=2) | NO_INVERSE, LONG, 48, 2048),
        ("_neighbors_kernel", LONG_KEYS | dict(KX=3, DX=1, DZ=1, DY=1) | SORTED | NO_INVERSE, LONG, 48, 2048),
        ("_neighbors_kernel", LONG_KEYS | dict(KX=3, DX=1, DZ=1, DY=1) | SORTED, LONG, 48, 2048),
        ("_neighbors_kernel", LONG_KEYS | dict.fromkeys(SIZES, 1) | dict(KX=1, DX=1) | NO_INVERSE, LONG, 48, 2048),
        ("_neighbors_kernel", SHORT_KEYS | dict(KX=3, DX=1) | SORTED | NO_INVERSE, SHORT, 48, 2048),
        ("_inverse_kernel", dict(BLOCK=BLOCK), LONG, 24, 0),
    ]
]

ONE = (1, 1, 1)
# geometries: kernel, stride, padding, dilation
HALVE = (3, 3, 3), (2, 2, 2), ONE, ONE
FIVE = (5, 5, 5), ONE, (2, 2, 2), ONE  # 125 offsets
# B, (Z, Y, X), number of voxels, geometry
CASES = [(*voxels, HALVE) for voxels in SETS] + [
    (*FULL, FIVE),
    (*SPARSE, (ONE, ONE, (0, 0, 0), ONE)),
    (*SPARSE, ((2, 2, 2), (2, 2, 2), (0, 0, 0), ONE)),
    (*SPARSE, ((3, 3, 3), (2, 2, 2), (0, 1, 1), ONE)),
    (*SPARSE, ((3, 1, 1), (2, 1, 1), (0, 0, 0), ONE)),
    (*SPARSE, ((2, 3, 4), (3, 1, 2), (1, 0, 2), (2, 3, 1))),  # different on every axis
    # rows of 64 cells, of one less and of one more: the reference's words have 64; offsets longer than a word
    (2, (2, 3, 63), 150, HALVE),
    (2, (2, 3, 64), 384, HALVE),
    (2, (2, 3, 65), 150, HALVE),
    (2, (2, 3, 200), 900, ((1, 2, 5), (1, 1, 2), (0, 0, 2), (1, 1, 33))),
]


@pytest.mark.parametrize("B, shape, N, geometry", CASES)
def test_matches_reference(B, shape, N, geometry, device):
    coords, (kernel, _, _, dilation) = random_voxels(B, shape, N, device), geometry
    keys, order = sort_voxels(coords, shape)
    inputs = dict(coords=coords, keys=keys, order=order, shape=shape, kernel=kernel, dilation=dilation)
    check_against_ref(submanifold_map, submanifold_map_ref, inputs, torch.float32)
    inputs = dict(zip(["kernel", "stride", "padding", "dilation"], geometry, strict=True), coords=coords, shape=shape)
    known = dict(keys=keys, order=order)
    for op, ref, more in [(strided_map, strided_map_ref, known), (transposed_map, transposed_map_ref, {})]:
        with launches() as launched:
            ours, truth = op(**inputs, **more, batch_size=B), ref(**inputs)
        assert bool(launched) == bool(N)
        for a, b in zip(ours, truth, strict=True):
            assert a.dtype == torch.int32 and torch.equal(a, b)
        check_against_ref(inverse_map, inverse_map_ref, dict(neighbor_idx=ours[1], N=N), torch.float32)
    with launches() as launched:
        ours = strided_tables(**inputs, **known, batch_size=B)
    of_kernels = ["_reached_keys_kernel", "_coords_kernel", "_neighbors_kernel"]
    assert launched == (of_kernels if len(ours[0]) else of_kernels[:1] if N else [])
    for a, b in zip(ours, strided_tables_ref(**inputs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def gather_conv(features, weight, neighbor_idx):
    """A convolution of one channel over a table: out[m] = sum_k weight[k] features[neighbor_idx[k, m]]."""
    read = features[neighbor_idx.long().clamp(min=0)] if len(features) else features.new_zeros(neighbor_idx.shape)
    return (weight.flatten()[:, None] * torch.where(neighbor_idx >= 0, read, 0)).sum(dim=0)


def densify(values, coords, B, shape):
    """[B, 1, *shape] with the values at the coordinates, 0 elsewhere."""
    dense = values.new_zeros(B, 1, *shape)
    b, z, y, x = coords.long().unbind(1)
    dense[b, 0, z, y, x] = values
    return dense


@pytest.mark.parametrize("B, shape, N, geometry", [*CASES, (*SPARSE, FIVE)])
def test_reference_matches_dense_convolution(B, shape, N, geometry, device):
    """Exactly: in fp64, of small integers. Dense results are rounded, since cuDNN may convolve by FFT.

    Output voxels are the cells where a convolution of the occupied cells with a kernel of ones is not 0.
    """
    coords, (kernel, stride, padding, dilation) = random_voxels(B, shape, N, device), geometry
    features = torch.randint(1, 9, (N,), device=device).double()
    weight = torch.randint(-9, 9, kernel, device=device).double()
    dense, occupied = densify(features, coords, B, shape), densify(torch.ones_like(features), coords, B, shape)

    def check(out_coords, out, dense_out, active):
        assert torch.equal(out_coords.long(), active[:, 0].nonzero())
        assert torch.equal(densify(out, out_coords, B, active.shape[2:]), torch.where(active, dense_out, 0))

    w, ones = weight[None, None], torch.ones_like(weight)[None, None]
    for make, conv, size_of in [
        (strided_map_ref, F.conv3d, out_shape),
        (transposed_map_ref, F.conv_transpose3d, transposed_out_shape),
    ]:
        args = dict(stride=stride, padding=padding, dilation=dilation)
        out_coords, neighbor_idx = make(coords, shape, *geometry)
        assert neighbor_idx.shape == (prod(kernel), len(out_coords))
        active = conv(occupied, ones, **args) > 0.5
        assert active.shape[2:] == size_of(shape, *geometry)
        check(out_coords, gather_conv(features, weight, neighbor_idx), conv(dense, w, **args).round(), active)

    # submanifold: padded so that offset kernel // 2 lies on the output, outputs restricted to the inputs
    neighbor_idx = submanifold_map_ref(coords, *sort_voxels_ref(coords, shape), shape, kernel, dilation)
    below = [k // 2 * d for k, d in zip(kernel, dilation, strict=True)]
    above = [(k - 1 - k // 2) * d for k, d in zip(kernel, dilation, strict=True)]
    pad = [p for pair in zip(reversed(below), reversed(above), strict=True) for p in pair]
    dense_out = F.conv3d(F.pad(dense, pad), w, dilation=dilation).round()
    b, z, y, x = coords.long().unbind(1)
    assert torch.equal(gather_conv(features, weight, neighbor_idx), dense_out[b, 0, z, y, x])


@pytest.mark.parametrize("fn", [submanifold_map, submanifold_map_ref])
def test_submanifold_by_hand(fn, device):
    """Voxels 0 and 1 are neighbors; 2 has the next key, but lies in the next row of cells; 3 is in the next sample."""
    coords = torch.tensor([[0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.int32, device=device)
    shape = (1, 2, 4)
    keys, order = sort_voxels(coords, shape)
    assert keys.tolist() == [2, 3, 4, 8]
    along_x = fn(coords, keys, order, shape, (1, 1, 3), ONE)
    assert along_x.tolist() == [[-1, 0, -1, -1], [0, 1, 2, 3], [1, -1, -1, -1]]
    in_plane = fn(coords, keys, order, shape, (1, 3, 3), (1, 1, 2))
    # offsets (y, x): (-1, -2), (-1, 0), (-1, 2)
    assert in_plane.tolist()[:3] == [[-1] * 4, [-1] * 4, [-1, -1, 0, -1]]


@pytest.mark.parametrize("fn", [strided_map, strided_map_ref])
def test_strided_by_hand(fn, device):
    """Voxels in cells 4 and 1 of 5; kernel 3, stride 2, padding 1: outputs 0, 1, 2 read cells -1..1, 1..3, 3..5."""
    coords = torch.tensor([[0, 0, 0, 4], [0, 0, 0, 1]], dtype=torch.int32, device=device)
    out_coords, neighbor_idx = fn(coords, (1, 1, 5), (1, 1, 3), (1, 1, 2), (0, 0, 1), ONE)
    assert out_coords.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2]]
    assert neighbor_idx.tolist() == [[-1, 1, -1], [-1, -1, 0], [1, -1, -1]]


@pytest.mark.parametrize("fn", [transposed_map, transposed_map_ref])
def test_transposed_by_hand(fn, device):
    """Voxels in cells 0 and 1 of 3; kernel 3, stride 2, padding 1: they spread to cells -1..1 and 1..3 of 5."""
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32, device=device)
    out_coords, neighbor_idx = fn(coords, (1, 1, 3), (1, 1, 3), (1, 1, 2), (0, 0, 1), ONE)
    assert out_coords.tolist() == [[0, 0, 0, x] for x in range(4)]
    assert neighbor_idx.tolist() == [[-1, 1, -1, -1], [0, -1, 1, -1], [-1, 0, -1, 1]]


@pytest.mark.parametrize("fn", [inverse_map, inverse_map_ref])
def test_inverse_map_twice_is_the_identity(fn, device):
    """Also: the inverse of a submanifold table is the table with its offsets reversed."""
    coords = random_voxels(2, (5, 7, 9), 200, device)
    out_coords, neighbor_idx = strided_map_ref(coords, (5, 7, 9), (3, 3, 3), (2, 2, 2), ONE, ONE)
    inverse_idx = fn(neighbor_idx, 200)
    assert torch.equal(fn(inverse_idx, len(out_coords)), neighbor_idx)
    keys, order = sort_voxels(coords, (5, 7, 9))
    neighbor_idx = submanifold_map_ref(coords, keys, order, (5, 7, 9), (3, 3, 3), ONE)
    assert torch.equal(fn(neighbor_idx, 200), neighbor_idx.flip(0))


@pytest.mark.parametrize("use_ref", [False, True], ids=["op", "ref"])
def test_tables_of_a_grid_of_8e9_cells(use_ref, device):
    """Two neighbors along x in each corner of samples 0 and 2; their keys exceed 32 bits."""
    shape = (41, 10000, 20000)
    # outer: the voxels in the corners; inner: for each, its neighbor one cell further inside along x
    outer = torch.tensor(list(product((0, 2), *((0, size - 1) for size in shape))), dtype=torch.int32, device=device)
    is_low = outer[:, 3] == 0
    inner = outer.clone()
    inner[:, 3] += torch.where(is_low, 1, -1)
    coords = torch.cat([outer, inner])  # row i and row (i + 16) % 32 are neighbors
    make_sub, make_strided = (submanifold_map_ref, strided_map_ref) if use_ref else (submanifold_map, strided_map)
    keys, order = (sort_voxels_ref if use_ref else sort_voxels)(coords, shape)
    assert keys[-1] == 3 * prod(shape) - 1

    neighbor_idx = make_sub(coords, keys, order, shape, (3, 3, 3), ONE)
    i = torch.arange(32, device=device)
    above = torch.cat([is_low, ~is_low])  # the neighbor's x is greater
    expected = torch.full((27, 32), -1, dtype=torch.int32, device=device)
    expected[13] = i  # of 27 offsets, 13 is the center, 12 and 14 are its neighbors along x
    expected[torch.where(above, 14, 12), i] = i.int().roll(16)
    assert torch.equal(neighbor_idx, expected)

    out_coords, neighbor_idx = make_strided(coords, shape, (2, 2, 2), (2, 2, 2), (0, 0, 0), ONE)
    halved = outer.clone()
    halved[:, 1:] //= 2
    kept = halved[:, 1] < 20  # no output reads the last of 41 slices: a kernel of 2 does not fit there
    assert torch.equal(out_coords, halved[kept])  # `product` ascends as the keys do
    assert torch.equal((neighbor_idx >= 0).sum(dim=0), torch.full((8,), 2, device=device))


@pytest.mark.parametrize("use_ref", [False, True], ids=["op", "ref"])
@pytest.mark.parametrize("size", [2**27, 2**28])
def test_strided_tables_of_the_largest_grids(size, use_ref, device):
    """Keys of 58 and 60 bits: with five bits of the pair, the former are sorted in one number of 63 bits, the latter
    are not."""
    shape = (8, size, size)
    last, near = (7, size - 1, size - 1), (7, size - 1, size - 2)
    coords = torch.tensor([[0, *last], [0, 0, 0, 0], [0, *near]], dtype=torch.int32, device=device)
    fn = strided_tables_ref if use_ref else strided_tables
    out_coords, keys, neighbor_idx, inverse_idx = fn(coords, shape, (1, 1, 3), ONE, (0, 0, 1), ONE)
    # outputs: x of 0 and 1, then the last three
    assert out_coords.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], *([0, *last[:2], size - 3 + i] for i in range(3))]
    assert keys.tolist() == [0, 1, *(8 * size**2 - 3 + i for i in range(3))]
    assert neighbor_idx.tolist() == [[-1, 1, -1, -1, 2], [1, -1, -1, 2, 0], [-1, -1, 2, 0, -1]]
    assert inverse_idx.tolist() == [[-1, 1, 4], [4, 0, 3], [3, -1, 2]]


@pytest.mark.parametrize("fn", [transposed_map, transposed_map_ref])
def test_transposed_map_reaches_the_last_int32_coordinate(fn, device):
    """A voxel reaches the last three of 2^31 - 1 cells; with four more cells, coordinates would overflow."""
    coords = torch.tensor([[0, 0, 0, 2**29 - 1]], dtype=torch.int32, device=device)
    kernel, stride = (1, 1, 3), (1, 1, 4)
    out_coords, neighbor_idx = fn(coords, (1, 1, 2**29), kernel, stride, (0, 0, 0), ONE)
    assert out_coords.tolist() == [[0, 0, 0, 2**31 - 4 + k] for k in range(3)]
    assert torch.equal(neighbor_idx, torch.eye(3, dtype=torch.int32, device=device) - 1)  # 0 on the diagonal, else -1
    for padding in (0, 2):  # cells that padding cuts off count too
        with pytest.raises(ValueError, match=r"\(1, 1, 2147483651\) cells.* too many: a coordinate has 32 bits"):
            fn(coords, (1, 1, 2**29 + 1), kernel, stride, (0, 0, padding), ONE)


@pytest.mark.parametrize("use_ref", [False, True], ids=["op", "ref"])
def test_reached_cells_must_have_int32_coordinates(use_ref, device):
    """Cells outside the grid too: a kernel of 3 reaches one cell beyond each border, `size` + 2 in all."""
    make_sub, make_strided = (submanifold_map_ref, strided_map_ref) if use_ref else (submanifold_map, strided_map)
    coords = torch.tensor([[0, 0, 0, 2**31 - 5], [0, 0, 0, 2**31 - 4]], dtype=torch.int32, device=device)
    for size, fits in [(2**31 - 3, True), (2**31 - 2, False)]:
        shape = (1, 1, size)
        for fn in (
            lambda: make_sub(coords, *sort_voxels(coords, shape), shape, (1, 1, 3), ONE),  # noqa: B023
            lambda: make_strided(coords, shape, (1, 1, 3), ONE, (0, 0, 1), ONE)[1],  # noqa: B023
        ):
            if fits:
                # the strided map also has an output below the first voxel
                assert fn()[:, -2:].tolist() == [[-1, 0], [0, 1], [1, -1]]
            else:
                with pytest.raises(ValueError, match="too many"):
                    fn()


@pytest.mark.parametrize("use_ref", [False, True], ids=["op", "ref"])
def test_sorted_voxels_need_no_order(use_ref, device):
    """For voxels sorted by key, the maps with order None are those with the order 0, 1, 2, ..."""
    shape = (5, 7, 9)
    coords = random_voxels(3, shape, 200, device)
    keys, order = sort_voxels(coords, shape)
    coords, identity = coords[order], torch.arange(200, device=device)
    make_sub, make_strided = (submanifold_map_ref, strided_map_ref) if use_ref else (submanifold_map, strided_map)
    for kernel in ((3, 3, 3), (2, 2, 2)):
        expected = make_sub(coords, keys, identity, shape, kernel, ONE)
        assert torch.equal(make_sub(coords, keys, None, shape, kernel, ONE), expected)
    expected = make_strided(coords, shape, *HALVE)  # sorts them itself
    for a, b in zip(make_strided(coords, shape, *HALVE, keys=keys), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_ref", [False, True], ids=["op", "ref"])
def test_order_of_the_inputs_does_not_matter(use_ref, device):
    shape, (kernel, _, _, dilation) = (5, 7, 9), HALVE
    coords = random_voxels(3, shape, 200, device)
    perm = torch.randperm(200, device=device)
    make_sub, make_strided = (submanifold_map_ref, strided_map_ref) if use_ref else (submanifold_map, strided_map)

    def unpermuted(neighbor_idx):
        """The table with rows of `coords` instead of rows of `coords[perm]`."""
        return torch.where(neighbor_idx >= 0, perm[neighbor_idx.long()], -1)

    one = make_sub(coords, *sort_voxels(coords, shape), shape, kernel, dilation)
    other = make_sub(coords[perm], *sort_voxels(coords[perm], shape), shape, kernel, dilation)
    assert torch.equal(one[:, perm].long(), unpermuted(other))
    out_coords, one = make_strided(coords, shape, *HALVE)
    same_coords, other = make_strided(coords[perm], shape, *HALVE)
    assert torch.equal(out_coords, same_coords) and torch.equal(one.long(), unpermuted(other))


def test_compiles_without_graph_breaks(device):
    """Including output sizes that depend on the data, and for another number of voxels."""
    shape = (5, 7, 9)

    def tables(coords):
        keys, order = sort_voxels(coords, shape)
        submanifold = submanifold_map(coords, keys, order, shape, (3, 3, 3), ONE)
        out_coords, down = strided_map(coords, shape, (3, 3, 3), (2, 2, 2), ONE, ONE)
        up_coords, up = transposed_map(coords, shape, (2, 2, 2), (2, 2, 2), (0, 0, 0), ONE)
        return submanifold, out_coords, down, inverse_map(down, coords.shape[0]), up_coords, up, down.shape[1] + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(tables, backend="aot_eager", fullgraph=True, dynamic=True)
        for N in (100, 200):
            coords = random_voxels(2, shape, N, device)
            for a, b in zip(compiled(coords), tables(coords), strict=True):
                assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    # registered as custom ops, into which dynamo does not trace
    for op in ("sort_voxels", "submanifold_map", "strided_map", "transposed_map", "inverse_map"):
        assert hasattr(torch.ops.unipad, op)
