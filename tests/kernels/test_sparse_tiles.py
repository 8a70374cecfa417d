import pytest
import torch

from kernels import backend, sparse_tiles
from kernels.sparse_gemm import BLOCK_R, LEAST
from kernels.sparse_tiles import BLOCK_C, BLOCK_K, WINDOW, chunks, pairs, tiles
from tests.ahead_of_time import Launch

INT = dict(elements=("i32",), budgets=("sm_80", "sm_90", "gfx942"))  # no argument has the element type
LAUNCHES = [
    Launch(
        "_tiles_kernel", dict(SORT=sort, SHARE=1, WINDOW=WINDOW, BLOCK_M=m, BLOCK_K=BLOCK_K),
        num_warps=16, registers=128, shared=32768, **INT,
    )
    for m, sort in [(64, True), (128, True), (128, False)]
] + [
    Launch(
        "_pairs_kernel", dict(WINDOW=WINDOW, BLOCK_K=BLOCK_K), dict(ends_ptr="*i64"),
        num_warps=8, registers=152, shared=1024, **INT,
    ),
    Launch(
        "_chunks_kernel", dict(LEAST=LEAST, MULTIPLE=2 * BLOCK_R, BLOCK_C=BLOCK_C, BLOCK_OFFSETS=128),
        dict(ends_ptr="*i64", first_ptr="*i64", end_ptr="*i64"), registers=72, shared=128, **INT,
    ),
]  # fmt: skip


def make_table(K, M, share, device, seed=0):
    gen = torch.Generator().manual_seed(seed)
    read = torch.randint(0, 2 * M, (K, M), generator=gen)
    return torch.where(torch.rand(K, M, generator=gen) < share, read, -1).int().to(device)


# K, M, share of neighbours
TABLES = [(27, 300, 0.3), (1, 64, 1.0), (8, 129, 0.1), (125, 70, 0.05), (3, 1, 0.0)]


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("K, M, share", TABLES)
def test_tiles_hold_the_table(K, M, share, sort, block_m, monkeypatch, device):
    monkeypatch.setattr(sparse_tiles, "WINDOW", 128)  # several windows
    table = make_table(K, M, share, device)
    made = tiles(table, block_m, sort)
    rows = made.row_idx.flatten()
    assert rows[rows >= 0].sort()[0].tolist() == list(range(M)) and (sort or rows[:M].tolist() == list(range(M)))
    assert ((rows >= 0).nonzero()[:, 0] // 128 == rows[rows >= 0] // 128).all()  # rows stay in their window
    back = torch.full_like(table, -1)
    for row, count, offset, read in zip(*(t.cpu() for t in made[:4]), strict=True):
        offset, read = offset[:count].long(), read[:count]
        assert (offset.diff() > 0).all()
        assert (read >= 0).any(dim=1).all(), "an offset that no row of the tile has"
        assert (read[:, row < 0] == -1).all()
        for k, n in zip(offset, read, strict=True):
            back[k, row[row >= 0].long()] = n[row >= 0].to(device)
    assert torch.equal(back, table)
    windows = [(part >= 0).sum(dim=1) for part in table.split(128, dim=1)]
    assert torch.equal(made.pairs_idx.long(), torch.stack(windows, dim=1))


@pytest.mark.parametrize("K, M, share", TABLES)
def test_pairs_are_in_the_order_of_the_table(K, M, share, monkeypatch, device):
    monkeypatch.setattr(sparse_tiles, "WINDOW", 128)
    table = make_table(K, M, share, device)
    k, m = (table >= 0).nonzero(as_tuple=True)
    made = pairs(table)
    assert torch.equal(made.row_idx[: len(m)].long(), m) and torch.equal(made.read_idx[: len(m)], table[k, m])
    assert torch.equal(made.ends[:, -1], k.bincount(minlength=K).cumsum(0))


@pytest.mark.parametrize("parts, least, multiple, size", [(1, 1, 1, 1583), (40, 1, 16, 48), (40, 100, 16, 112)])
def test_chunks_are_of_one_length(parts, least, multiple, size, device):
    """1583 pairs of 27 offsets."""
    table = make_table(27, 200, 0.3, device)
    ends = pairs(table).ends[:, -1].tolist()
    assert ends[-1] == 1583
    expected = [(i, min(i + size, b)) for a, b in zip([0, *ends], ends, strict=False) for i in range(a, b, size)]
    first, end, until_idx = (t.tolist() for t in chunks(table, parts, least, multiple))
    assert len(first) == parts + 27 >= len(expected)
    got = list(zip(first, end, strict=True))
    assert got[: len(expected)] == expected and all(a >= b for a, b in got[len(expected) :])
    assert until_idx == [sum(b <= end for _, b in expected) for end in ends]


def test_rows_with_the_same_offsets_share_tiles(device):
    """The inverse table of a 3 x 3 x 3 convolution of stride 2: eight classes of rows, as parities of cells go."""
    gen = torch.Generator().manual_seed(0)
    parity = torch.randint(0, 8, (1024,), generator=gen)
    has = torch.ones(27, 1024, dtype=torch.bool)
    for axis, step in enumerate((9, 3, 1)):
        is_odd = (parity >> axis) % 2 == 1
        middle = (torch.arange(27) // step % 3 == 1)[:, None]
        has &= middle == is_odd  # one offset reaches an odd cell, two an even one
    table = torch.where(has, 0, -1).int().to(device)
    needed, done = has.sum().item(), 64 * tiles(table, 64).count_idx.sum().item()
    assert done < 1.6 * needed
    assert 64 * has.view(27, 16, 64).any(dim=2).sum() > 7 * needed  # in the order of the rows


def test_what_is_made_of_a_table_is_kept_while_it_stays(device):
    table = make_table(3, 40, 0.5, device)
    made = tiles(table, 64), pairs(table)
    assert tiles(table, 64) is made[0] and pairs(table) is made[1] and tiles(table, 128) is not made[0]
    table[0, 0] = 7
    assert tiles(table, 64) is not made[0] and pairs(table) is not made[1]


def test_a_cuda_graph_keeps_nothing_of_its_own(monkeypatch, device):
    """Its memory holds tiles only after a replay; what was there before it is used."""
    before, new = make_table(3, 40, 0.5, device), make_table(3, 40, 0.5, device)
    made = tiles(before, 64)
    monkeypatch.setattr(backend, "capturing", lambda device: True)
    assert tiles(before, 64) is made
    in_graph = tiles(new, 64), pairs(new)
    monkeypatch.undo()
    assert tiles(new, 64) is not in_graph[0] and pairs(new) is not in_graph[1]
    assert torch.equal(tiles(new, 64).row_idx, made.row_idx)
