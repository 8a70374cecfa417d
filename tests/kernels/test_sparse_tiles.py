"""The layouts that a `NeighborTable` makes of a table, and its cache. tests/test_compiles.py checks LAUNCHES."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from tests.ahead_of_time import ASSEMBLED_TARGETS, Launch
from tests.check import launches
from tests.conftest import HAS_GPU
from unipad.kernels import backend, sparse_tiles
from unipad.kernels.sparse_conv import sparse_conv, sparse_conv_act
from unipad.kernels.sparse_gemm import BLOCK_R, MIN_PAIRS
from unipad.kernels.sparse_tiles import BLOCK_C, BLOCK_COUNTS, BLOCK_K, WINDOW, NeighborTable

INT = dict(elements=("i32",), limits_on=ASSEMBLED_TARGETS)  # elements: no argument has their type, so one is enough
LAUNCHES = [
    Launch(
        "_tiles_kernel", dict(SORT=sort, OFFSETS_PER_BIT=1, WINDOW=WINDOW, BLOCK_M=m, BLOCK_K=BLOCK_K),
        num_warps=16, registers=128, shared=32768, **INT,
    )
    for m, sort in [(64, True), (128, True), (128, False)]
] + [
    Launch(
        # BLOCK_OFFSETS: the 125 of a 5 x 5 x 5 kernel, rounded up to a power of two
        "_pairs_kernel",
        dict(MIN_PAIRS=MIN_PAIRS, MULTIPLE=2 * BLOCK_R, WINDOW=WINDOW, BLOCK_K=BLOCK_K, BLOCK_C=BLOCK_C)
        | dict(BLOCK_OFFSETS=128, BLOCK_COUNTS=BLOCK_COUNTS),
        dict(first_ptr="*i64", end_ptr="*i64"), num_warps=8, registers=152, shared=4096, **INT,
    ),
]  # fmt: skip


def make_table(K, M, fraction, device, seed=0):
    """[K, M] int32 random table: a fraction of the entries are rows in [0, 2 * M), the others -1."""
    gen = torch.Generator().manual_seed(seed)
    read = torch.randint(0, 2 * M, (K, M), generator=gen)
    return torch.where(torch.rand(K, M, generator=gen) < fraction, read, -1).int().to(device)


# K, M, fraction of neighbors
TABLES = [(27, 300, 0.3), (1, 64, 1.0), (8, 129, 0.1), (125, 70, 0.05), (3, 1, 0.0)]


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("K, M, fraction", TABLES)
def test_tiles_contain_every_pair_of_the_table(K, M, fraction, sort, block_m, monkeypatch, device):
    monkeypatch.setattr(sparse_tiles, "WINDOW", 128)  # several windows
    table = make_table(K, M, fraction, device)
    tiles = NeighborTable(table).tiles(block_m, sort)
    rows = tiles.row_idx.flatten()
    assert rows[rows >= 0].sort()[0].tolist() == list(range(M)) and (sort or rows[:M].tolist() == list(range(M)))
    assert ((rows >= 0).nonzero()[:, 0] // 128 == rows[rows >= 0] // 128).all()  # rows stay in their window
    restored = torch.full_like(table, -1)
    for row, count, offset, read in zip(*(t.cpu() for t in tiles[:4]), strict=True):
        offset, read = offset[:count].long(), read[:count]
        assert (offset.diff() > 0).all()
        assert (read >= 0).any(dim=1).all(), "a listed offset at which no row of the tile has a neighbor"
        assert (read[:, row < 0] == -1).all()
        for k, n in zip(offset, read, strict=True):
            restored[k, row[row >= 0].long()] = n[row >= 0].to(device)
    assert torch.equal(restored, table)
    counts = [(window >= 0).sum(dim=1) for window in table.split(128, dim=1)]
    assert torch.equal(tiles.pairs_idx.long(), torch.stack(counts, dim=1))


def test_rows_with_too_many_offsets_for_the_sort_key_are_not_sorted(device):
    table = make_table(sparse_tiles.MAX_SORTED + 1, 40, 0.9, device)
    assert NeighborTable(table).tiles(64).row_idx[0, :40].tolist() == list(range(40))


@pytest.mark.parametrize("K, M, fraction", TABLES)
def test_pairs_are_in_the_order_of_the_table(K, M, fraction, monkeypatch, device):
    monkeypatch.setattr(sparse_tiles, "WINDOW", 128)
    table = make_table(K, M, fraction, device)
    k, m = (table >= 0).nonzero(as_tuple=True)
    monkeypatch.setattr(sparse_tiles, "BLOCK_COUNTS", 16)  # several steps
    pairs = NeighborTable(table).pairs(max_chunks=1, min_pairs=K * M + 1, multiple=1)
    assert torch.equal(pairs.row_idx[: len(m)].long(), m) and torch.equal(pairs.read_idx[: len(m)], table[k, m])
    # a chunk per offset that has pairs
    ends = k.unique(return_counts=True)[1].cumsum(0)
    assert torch.equal(pairs.end[: len(ends)], ends) and (pairs.end <= pairs.first)[len(ends) :].all()


@pytest.mark.parametrize(
    "max_chunks, min_pairs, multiple, size", [(1, 1, 1, 1583), (40, 1, 16, 48), (40, 100, 16, 112)]
)
def test_chunks_have_equal_length_except_the_last_of_an_offset(max_chunks, min_pairs, multiple, size, device):
    """The table has 1583 pairs at 27 offsets; size: expected pairs per chunk."""
    table = NeighborTable(make_table(27, 200, 0.3, device))
    ends = (table.idx >= 0).sum(dim=1).cumsum(0).tolist()
    assert ends[-1] == 1583
    expected = [(i, min(i + size, b)) for a, b in zip([0, *ends], ends, strict=False) for i in range(a, b, size)]
    with launches() as launched:
        first, end, chunk_end_idx = (t.tolist() for t in table.pairs(max_chunks, min_pairs, multiple)[2:])
    assert launched == ["_tiles_kernel", "_pairs_kernel"]
    assert len(first) == max_chunks + 27 >= len(expected)
    got = list(zip(first, end, strict=True))
    assert got[: len(expected)] == expected and all(a >= b for a, b in got[len(expected) :])  # the others are empty
    assert chunk_end_idx == [sum(b <= end for _, b in expected) for end in ends]


def test_rows_with_the_same_offsets_share_tiles(device):
    """Neighbors as in the inverse table of a 3 x 3 x 3 convolution of stride 2 without padding: eight sets of offsets,
    one for each parity of a cell's (z, y, x)."""
    gen = torch.Generator().manual_seed(0)
    parity = torch.randint(0, 8, (1024,), generator=gen)
    has = torch.ones(27, 1024, dtype=torch.bool)
    for axis, step in enumerate((9, 3, 1)):
        is_odd = (parity >> axis) % 2 == 1
        middle = (torch.arange(27) // step % 3 == 1)[:, None]
        has &= middle == is_odd  # along an axis, one offset reaches an odd cell, two an even one
    table = torch.where(has, 0, -1).int().to(device)
    # products of a row and an offset; the GEMM computes those of all 64 rows of a tile
    needed, computed = has.sum().item(), 64 * NeighborTable(table).tiles(64).count_idx.sum().item()
    assert computed < 1.6 * needed
    assert 64 * has.view(27, 16, 64).any(dim=2).sum() > 7 * needed  # computed without the sort


def test_a_table_caches_its_tiles_and_pairs(device):
    table = NeighborTable(make_table(3, 40, 0.5, device))
    tiles, pairs = table.tiles(64), table.pairs(4, 1, 1)
    assert table.tiles(64) is tiles and table.pairs(4, 1, 1) is pairs and table.tiles(128) is not tiles
    assert NeighborTable.of(table) is table and NeighborTable.of(table.idx) is table
    assert NeighborTable.of(table.idx.clone()) is not table
    with launches() as launched:
        other = NeighborTable(table.idx.clone())
        fine = other.pairs(4, 1, 1)
        assert launched == ["_tiles_kernel", "_pairs_kernel"]  # a new cache: the tiles come first, they count the pairs
        coarse = other.pairs(1, 100, 1)  # only the chunks are new, three of them
    assert launched == ["_tiles_kernel", "_pairs_kernel", "_pairs_kernel"]
    assert coarse.read_idx is fine.read_idx and coarse.row_idx is fine.row_idx
    total, ends = (table.idx >= 0).sum().item(), (table.idx >= 0).sum(dim=1).cumsum(0)
    assert torch.equal(fine.read_idx[:total], pairs.read_idx[:total]) and torch.equal(coarse.end[:3], ends)


def test_a_modified_table_is_rejected(device):
    idx = make_table(3, 40, 0.5, device)
    table = NeighborTable(idx)
    tiles = table.tiles(64)
    idx[0, 0] = 7
    with pytest.raises(AssertionError, match="was modified"):
        table.tiles(64)
    assert NeighborTable.of(idx).tiles(64) is not tiles


def test_a_deep_copy_has_a_separate_cache(device):
    """The version counter of the copied tensor starts at 0, although the original was modified before: the copy must
    not count as modified."""
    idx = make_table(27, 300, 0.3, device)
    idx[0, 0] = -1
    table = NeighborTable(idx)
    tiles, twin = table.tiles(64), copy.deepcopy(table)
    assert all(map(torch.equal, twin.tiles(64), tiles)) and twin.tiles(64) is not tiles
    assert NeighborTable.of(twin.idx) is twin and NeighborTable.of(idx) is table


def test_the_cache_is_freed_with_its_index_tensor(device):
    """At once, not by the garbage collector: on a GPU it is device memory. Not already with the table: the backward of
    compiled code has the tensor only."""
    table = NeighborTable(make_table(3, 40, 0.5, device))
    tiles, idx = table.tiles(64), table.idx
    made = weakref.ref(tiles.row_idx)
    gc.disable()
    try:
        del table
        assert not sparse_tiles._tables.get(id(idx)) and NeighborTable.of(idx).tiles(64) is tiles
        del tiles, idx
        assert made() is None
    finally:
        gc.enable()


@pytest.fixture
def switch_stream(monkeypatch):
    """`switch_stream(2, capturing=True)` sets the current stream, at first 1, and whether a graph is captured on it."""
    current = {}

    def switch(stream, capturing=False):
        current.update(stream=stream, capturing=capturing)

    switch(1)
    monkeypatch.setattr(backend, "stream", lambda device: current["stream"])
    monkeypatch.setattr(backend, "capturing", lambda device: current["capturing"])
    return switch


def test_stream_and_capturing_are_those_of_cuda(monkeypatch):
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=10 + device.index))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backend.stream(cuda) == 11 and backend.stream(cpu) == 0
    assert backend.capturing(cuda) and not backend.capturing(cpu)


def test_a_stream_does_not_use_tiles_that_another_may_still_compute(switch_stream, device):
    table = NeighborTable(make_table(3, 40, 0.5, device))
    first = table.tiles(64)
    switch_stream(2)
    second = table.tiles(64)
    assert second is not first and table.tiles(64) is second
    switch_stream(1)
    assert table.tiles(64) is first


def test_a_graph_uses_the_cache_of_its_warm_up(switch_stream, device):
    """Warmed up on one stream and captured on another, as by `torch.cuda.graph`: replays compute no tiles."""
    table, weight = NeighborTable(make_table(3, 40, 0.5, device)), torch.randn(8, 3, 1, 1, 8, device=device)
    # not the real inverse: only launches are compared
    inverse = NeighborTable(torch.full((3, 80), -1, dtype=torch.int32, device=device))
    features = torch.randn(80, 8, device=device, requires_grad=True)

    def step():
        """Names of the launched kernels that make layouts."""
        with launches() as launched:
            sparse_conv(features, weight.requires_grad_(), table, inverse).sum().backward()
        return [name for name in launched if name in ("_tiles_kernel", "_pairs_kernel")]

    switch_stream(2)
    assert step()
    switch_stream(3, capturing=True)
    assert not step()


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")
@torch.no_grad()
def test_a_convolution_replayed_as_a_cuda_graph_matches(device):
    table, weight = NeighborTable(make_table(3, 40, 0.5, device)), torch.randn(8, 3, 1, 1, 8, device=device)
    features, other = torch.randn(2, 80, 8, device=device)
    expected = sparse_conv_act(other, weight, table)
    graph = torch.cuda.CUDAGraph()
    with launches() as launched, torch.cuda.graph(graph):  # the tiles are cached since `expected`
        out = sparse_conv_act(features, weight, table)
    features.copy_(other)
    graph.replay()
    assert torch.equal(out, expected) and launched == ["_gather_gemm_kernel"]


def test_tiles_made_during_capture_are_not_cached(switch_stream, device):
    """Only a replay of the graph computes them; afterwards, the same stream and another one make their own."""
    table = NeighborTable(make_table(3, 40, 0.5, device))
    switch_stream(3, capturing=True)
    in_graph = table.tiles(64), table.pairs(4, 1, 1)
    switch_stream(3)
    assert table.tiles(64) is not in_graph[0] and table.pairs(4, 1, 1) is not in_graph[1]
    switch_stream(1)
    assert table.tiles(64) is not in_graph[0]


def test_a_trial_does_not_change_the_cache(device):
    """A trial is the copy of a table on which the tuner times a candidate; it starts with the table's cache."""
    table = NeighborTable(make_table(3, 40, 0.5, device))
    known = table.tiles(64)
    trial = table.trial()
    assert trial.tiles(64) is known
    tried = trial.tiles(128)
    assert table.tiles(128) is not tried and NeighborTable.of(table.idx) is table


def test_compiled_layers_share_the_cache_of_their_table(device):
    """Compiled code passes index tensors to ops, which look up their `NeighborTable`s, in the backward too."""
    # not the real inverse: only launches are compared
    inverse = NeighborTable(torch.full((3, 80), -1, dtype=torch.int32, device=device))
    table, weight = NeighborTable(make_table(3, 40, 0.5, device)), torch.randn(8, 3, 1, 1, 8, device=device)
    features = torch.randn(80, 8, device=device, requires_grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def layers(features, weight):
        return sparse_conv(features, weight, table, inverse) + sparse_conv(2 * features, weight, table, inverse)

    with launches() as launched:
        layers(features, weight.requires_grad_()).sum().backward()
    assert launched.count("_gather_gemm_kernel") == 4 and launched.count("_tiles_kernel") == 2  # of table and inverse
