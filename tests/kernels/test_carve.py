import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import launches
from unipad.kernels.carve import BLOCK_R, FREE, FULL, UNKNOWN, carve, carve_ref

TYPES = dict(hit_ptr="*i1", marks_ptr="*i32", low=("fp32",) * 3, cell=("fp32",) * 3, shape=("i32",) * 3)
LAUNCHES = [  # checked by tests/test_compiles.py
    Launch(
        "_carve_kernel", dict(RANKED=ranked, ALL_HIT=all_hit, BLOCK_R=BLOCK_R), TYPES, elements=("fp32",),
        registers=96, shared=1024,
    )
    for ranked, all_hit in [(True, True), (True, False), (False, True), (False, False)]
]  # fmt: skip

BOTH = pytest.mark.parametrize("fn", [carve, carve_ref])
UNIT = dict(low=(0.0, 0.0, 0.0), cell=(1.0, 1.0, 1.0))  # cells of a meter, from the origin on
TURNS = [lambda p: p, lambda p: p.flip(-1), lambda p: p.roll(1, -1)]  # x, y, z in other orders


def make_inputs(R, B, device, low=(-2.0, -1.5, -1.0), cell=(0.5, 0.3, 0.7), shape=(3, 10, 8)):
    """Rays in and around the grid; some are axis-parallel, on borders of cells, of length 0, not finite or not used."""
    size = torch.tensor([n * c for n, c in zip(shape[::-1], cell, strict=True)], device=device)
    origins, ends = (
        (torch.rand(R, 3, device=device) * 2 - 0.5) * size + torch.tensor(low, device=device) for _ in "oe"
    )
    ends[1::5, 1:] = origins[1::5, 1:]
    origins[2::7, 0], ends[3::7, 0] = (((t * 2).round() / 2)[:, 0] for t in (origins[2::7], ends[3::7]))
    ends[4::11] = origins[4::11]
    ends[5::13, 2], origins[6::17, 1] = torch.inf, torch.nan
    return dict(
        origins=origins,
        ends=ends,
        volume_idx=torch.randint(-1, B + 1, (R,), device=device, dtype=torch.int32),
        low=low,
        cell=cell,
        shape=shape,
        B=B,
        rank=torch.randint(0, 3, (R,), device=device, dtype=torch.int32),
        hit=torch.rand(R, device=device) < 0.7,
    )


@pytest.mark.parametrize("optional", [(), ("rank",), ("hit",), ("rank", "hit")], ids=str)
@pytest.mark.parametrize("R, B", [(1, 1), (7, 3), (BLOCK_R, 2), (BLOCK_R + 1, 1), (333, 2), (0, 2)])
def test_matches_reference(R, B, optional, device):
    inputs = make_inputs(R, B, device)
    inputs |= {name: None for name in ("rank", "hit") if name not in optional}
    with launches() as launched:
        state = carve(**inputs)
    assert bool(launched) == bool(R) and state.dtype == torch.uint8 and state.shape == (B, 3, 10, 8)
    assert torch.equal(state, carve_ref(**inputs))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 17, 5), (9, 1, 33)], ids=str)
def test_matches_reference_on_other_grids(shape, device):
    inputs = make_inputs(150, 2, device, low=(-54.0, 3.1, 0.0), cell=(0.6, 1.7, 0.075), shape=shape)
    assert torch.equal(carve(**inputs), carve_ref(**inputs))


def lines_of(state):
    """Rows of a state of one volume of one slice, from the highest y down, as text: . unknown, o free, # full."""
    return ["".join(".o#"[s] for s in row) for row in state[0, 0].flip(0).tolist()]


def carved(fn, device, rays, shape, **others):
    """The state of one volume after rays (origin, end), each (x, y, z)."""
    points = torch.tensor(rays, device=device, dtype=torch.float32).view(-1, 2, 3)
    idx = torch.zeros(len(points), device=device, dtype=torch.int32)
    return fn(points[:, 0], points[:, 1], idx, shape=shape, B=1, **UNIT, **others)


@BOTH
@pytest.mark.parametrize(
    "start, end, expected",
    [
        ((0.5, 0.5), (3.5, 0.5), [".....", ".....", "ooo#."]),  # parallel to x
        ((3.5, 0.5), (0.5, 0.5), [".....", ".....", "#ooo."]),
        ((1.5, 2.5), (1.5, 0.5), [".o...", ".o...", ".#..."]),  # and to y
        ((0.5, 0.5), (2.5, 2.5), ["..#..", ".o...", "o...."]),  # through corners: cells that it touches are not crossed
        ((2.5, 2.5), (0.5, 0.5), ["..o..", ".o...", "#...."]),
        ((0.5, 2.5), (2.5, 0.5), ["o....", ".o...", "..#.."]),
        ((0.0, 0.0), (4.5, 1.5), [".....", "...o#", "ooo.."]),  # through the corner (3, 1), 3 / 4.5 of the way
        ((0.5, 0.5), (4.5, 1.5), [".....", "..oo#", "ooo.."]),  # y = 1 in the middle of cell x = 2
        ((-2.5, 0.5), (1.5, 0.5), [".....", ".....", "o#..."]),  # starts outside
        ((1.5, 0.5), (9.5, 0.5), [".....", ".....", ".oooo"]),  # ends outside: nothing is full
        ((-2.0, 1.5), (9.0, 1.5), [".....", "ooooo", "....."]),  # both
        ((-1.5, -1.5), (2.5, 2.5), ["..#..", ".o...", "o...."]),  # enters through a corner of the grid
        ((2.5, 1.5), (6.5, 5.5), ["...o.", "..o..", "....."]),  # leaves through an edge point, x = 4 and y = 3
        ((-1.0, 1.0), (1.0, -1.0), [".....", ".....", "....."]),  # touches the grid's corner
        ((-1.0, 0.0), (6.0, 0.0), [".....", ".....", "ooooo"]),  # along the lower border, which is inside
        ((-1.0, 3.0), (6.0, 3.0), [".....", ".....", "....."]),  # along the upper one, which is not
        ((-1.0, 4.0), (6.0, 4.0), [".....", ".....", "....."]),  # beside the grid
        ((-1.0, 2.0), (2.0, 6.0), [".....", ".....", "....."]),  # past it: x = 0 only where y = 3.3
        ((5.5, 0.5), (8.5, 0.5), [".....", ".....", "....."]),  # would meet it backwards
        ((1.5, 1.5), (1.5, 1.5), [".....", ".#...", "....."]),  # of length 0
        ((1.0, 1.0), (1.0, 1.0), [".....", ".#...", "....."]),
        ((7.0, 7.0), (7.0, 7.0), [".....", ".....", "....."]),
        ((0.5, 0.5), (3.0, 0.5), [".....", ".....", "ooo#."]),  # ends on a border: the point is in the cell above it
        ((3.0, 0.5), (0.5, 0.5), [".....", ".....", "#oo.."]),  # starts on one: only touches the cell above it
        ((4.5, 0.5), (3.0, 0.5), [".....", ".....", "...#o"]),
        ((-3.0, 0.5), (0.0, 0.5), [".....", ".....", "#...."]),  # ends on the grid's lower border
        ((2.5, 0.5), (5.0, 0.5), [".....", ".....", "..ooo"]),  # and on its upper one, which is outside
        ((8.0, 0.5), (5.0, 0.5), [".....", ".....", "....."]),
        ((1.2, 0.5), (1.8, 0.5), [".....", ".....", ".#..."]),  # within a cell
        ((0.5, 0.5), (float("nan"), 0.5), [".....", ".....", "....."]),
        ((float("inf"), 0.5), (0.5, 0.5), [".....", ".....", "....."]),
        ((-3e38, 0.5), (3e38, 0.5), [".....", ".....", "....."]),  # its length is infinite
    ],
)
def test_rays_by_hand(fn, start, end, expected, device):
    state = carved(fn, device, [((*start, 0.5), (*end, 0.5))], shape=(1, 3, 5))
    assert lines_of(state) == expected


@BOTH
@pytest.mark.parametrize("turn", TURNS)
def test_the_axes_are_alike(fn, turn, device):
    """A ray with crossings along all three axes: at t = 1/8 into x = 1, 1/4 into y = 1, 3/8 into x = 2, 1/2 into z = 1,
    5/8 into x = 3, 3/4 into y = 2, 7/8 into x = 4."""
    rays = torch.tensor([[(0.5, 0.5, 0.5), (4.5, 2.5, 1.5)]])
    cells = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 1, 1), (3, 1, 1), (3, 2, 1)]
    state = carved(fn, device, turn(rays).tolist(), shape=(5, 5, 5))[0].permute(2, 1, 0)  # x, y, z
    free, full = ([tuple(c) for c in (state == s).nonzero().tolist()] for s in (FREE, FULL))
    assert sorted(free) == sorted(tuple(turn(torch.tensor(c)).tolist()) for c in cells)
    assert full == [tuple(turn(torch.tensor((4, 2, 1))).tolist())]


@BOTH
def test_a_ray_without_a_hit_frees_its_last_cell(fn, device):
    rays = [((0.5, 0.5, 0.5), (2.5, 0.5, 0.5)), ((4.5, 1.5, 0.5), (3.0, 1.5, 0.5)), ((0.5, 2.5, 0.5), (2.0, 2.5, 0.5))]
    rays += [((4.5, 0.5, 0.5), (4.5, 0.5, 0.5))]  # of length 0: it crosses nothing
    state = carved(fn, device, rays, shape=(1, 3, 5), hit=torch.zeros(4, device=device, dtype=torch.bool))
    assert lines_of(state) == ["oo...", "...oo", "ooo.."]


@BOTH
def test_the_highest_rank_decides_and_among_equals_the_end(fn, device):
    """Rays along x: ends in x = 2, and crosses it, once in both orders of rank and once at the same rank."""
    through, into = ((0.5, 0.0, 0.5), (4.5, 0.0, 0.5)), ((0.5, 0.0, 0.5), (2.5, 0.0, 0.5))

    def line(*ranks):
        rank = torch.tensor(ranks, device=device, dtype=torch.int32)
        return lines_of(carved(fn, device, [through, into], shape=(1, 1, 5), rank=rank))

    assert line(0, 0) == line(5, 5) == line(0, 1) == ["oo#o#"] and line(1, 0) == line(2**30 - 2, 0) == ["oooo#"]
    assert (UNKNOWN, FREE, FULL) == (0, 1, 2)


@BOTH
def test_every_ray_carves_its_own_volume(fn, device):
    origins, ends = torch.full((4, 3), 0.5, device=device), torch.full((4, 3), 0.5, device=device)
    ends[:, 0] += torch.arange(4, device=device)
    idx = torch.tensor([2, -1, 0, 3], device=device, dtype=torch.int32)  # no volume -1 or 3
    state = fn(origins, ends, idx, shape=(1, 1, 4), B=3, **UNIT)
    assert ["".join(".o#"[s] for s in row) for row in state.flatten(1).tolist()] == ["oo#.", "....", "#..."]


@BOTH
def test_crossed_cells_are_those_with_a_part_of_the_ray(fn, device):
    """Against the definition, in fp64: the part of the ray between the faces of each cell has a positive length."""
    inputs = make_inputs(60, 1, device) | dict(volume_idx=torch.zeros(60, device=device, dtype=torch.int32), rank=None)
    low, cell = (torch.tensor(inputs[k], device=device, dtype=torch.float64) for k in ("low", "cell"))
    start, end = ((inputs[k].double() - low) / cell for k in ("origins", "ends"))
    z, y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in inputs["shape"]), indexing="ij")
    corner = torch.stack([x, y, z], dim=-1).double()  # [Z, Y, X, 3]
    for r in (start.isfinite() & end.isfinite()).all(dim=1).nonzero().flatten().tolist():
        d = (end - start)[r]
        near, far = (corner - start[r]) / d, (corner + 1 - start[r]) / d
        within = (start[r] >= corner) & (start[r] < corner + 1) | (d != 0)
        enter = torch.minimum(near, far).where(d != 0, 0.0).amax(dim=-1).clamp(min=0)
        leave = torch.maximum(near, far).where(d != 0, 1.0).amin(dim=-1).clamp(max=1)
        length = (leave - enter).where(within.all(dim=-1), -1.0)
        state = fn(**inputs | {k: inputs[k][r : r + 1] for k in ("origins", "ends", "volume_idx", "hit")})[0]
        marked, full = state > 0, state == FULL
        assert not (marked & ~full & (length < -1e-5)).any(), r  # fp32 rounds to within 1e-5 of the ray's length
        assert not (~marked & (length > 1e-5) & d.any()).any(), r
        holds = ((end[r] >= corner) & (end[r] < corner + 1)).all(dim=-1) & inputs["hit"][r]
        assert full.sum() == holds.sum() <= 1, r


def test_bit_equal_from_run_to_run_and_in_any_order(device):
    inputs = make_inputs(300, 2, device)
    state, order = carve(**inputs), torch.randperm(300, device=device)
    per_ray = ("origins", "ends", "volume_idx", "rank", "hit")
    shuffled = carve(**inputs | {name: inputs[name][order] for name in per_ray})
    assert torch.equal(state, carve(**inputs)) and torch.equal(state, shuffled)


def test_a_grid_beyond_32_bits_is_rejected(device):
    with pytest.raises(ValueError, match="too many"):
        carve(**make_inputs(1, 1, device) | dict(shape=(1, 1, 2**31)))
