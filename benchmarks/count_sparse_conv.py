"""Costs of sparse_conv on the LiDAR recipe's encoder: products and bytes relative to the minimum, and machine code.

    python -m benchmarks.count_sparse_conv

Needs no GPU: voxels come from benchmarks/lidar_scene.py. The machine code is compiled from `LAUNCHES` of
tests/kernels/test_sparse_tiles.py and test_sparse_gemm.py, so its table needs the test dependencies (pip install -e
'.[test]').

A pair is an output row and a neighbor that it reads at one offset; it needs one product, of the neighbor's row and a
[Cin, Cout] matrix. "waste" is products computed / products needed. It is above 1 since a tile (the output rows of a
program) multiplies all its rows at every offset at which one of them has a neighbor, and for the weights' gradient
since chunks are padded to blocks, or missing neighbors are multiplied as zeros. "reuse" is pairs / distinct rows that a
tile reads, both summed over the tiles. Bytes are L2 requests: indices, rows, weights, sums and results. A row that an
earlier offset of a tile has read comes from the L1 if still cached (column "MB, L1 hits"), or from the L2 again (column
"MB, L1 misses"). The minimum reads every input row and every weight once and one index per pair, and writes the
results; for the weights' gradient it reads the rows of both sides and no weights.
"""

import importlib.util
from dataclasses import dataclass

import torch

from benchmarks.lidar_scene import DOWNSAMPLES, NUSCENES, SHAPE, voxels
from unipad.kernels import sparse_gemm, sparse_tiles
from unipad.kernels.sparse_layers import MAX_ALIKE
from unipad.kernels.sparse_map import inverse_map, strided_map, submanifold_map
from unipad.kernels.sparse_outputs import out_shape
from unipad.kernels.voxel_keys import sort_voxels

WIDTHS, BLOCKS = (16, 32, 64, 128), 2  # channels of the stages, residual blocks of each
DTYPE, BYTES = torch.bfloat16, 2  # of an element
# The last table, of machine code: constexprs that it leaves out, and SASS instructions that it counts
HIDDEN = "MIN_PAIRS", "MULTIPLE", "SORT", "OFFSETS_PER_BIT", "VIA_L1"
KINDS = "HGMMA", "HMMA", "FFMA", "LDGSTS", "LDG"


@dataclass
class Layer:
    """A sparse convolution from N to M voxels with K offsets."""

    name: str
    table: torch.Tensor  # [K, M] of the forward
    inverse: torch.Tensor  # [K, N] for the gradient of the features; submanifold: `table`, up to the offsets' order
    out_coords: torch.Tensor  # [M, 4]
    coords: torch.Tensor  # [N, 4]
    c_in: int
    c_out: int
    times: int = 1  # how many such layers the encoder has

    def passes(self):
        """Yield (pass, table, coordinates of its output rows, channels read, channels written)."""
        yield "forward", self.table, self.out_coords, self.c_in, self.c_out
        if self.c_in > 5:  # the points' 5 features need no gradient
            yield "d_features", self.inverse, self.coords, self.c_out, self.c_in


def layers():
    """The encoder's convolutions in order, except the last, which is 1 x 1 x 1."""
    coords, shape = voxels(), SHAPE
    coords = coords[sort_voxels(coords, shape)[1]]
    all_layers = []
    for i, width in enumerate(WIDTHS):
        if i:
            out_coords, table = strided_map(coords, shape, *DOWNSAMPLES[i - 1])
            inverse = inverse_map(table, len(coords))
            all_layers.append(Layer(f"down {i}", table, inverse, out_coords, coords, WIDTHS[i - 1], width))
            coords, shape = out_coords, out_shape(shape, *DOWNSAMPLES[i - 1])
        table = submanifold_map(coords, *sort_voxels(coords, shape), shape, (3, 3, 3), (1, 1, 1))
        if not i:
            all_layers.append(Layer("input", table, table, coords, coords, 5, width))
        times = 2 * BLOCKS  # two convolutions per residual block
        all_layers.append(Layer(f"stage {i + 1}", table, table, coords, coords, width, width, times))
    return all_layers


# Row orders


def masks(table):
    """[M] int64, bit k: whether a row has a neighbor at offset k."""
    return ((table >= 0).long() << torch.arange(len(table))[:, None]).sum(dim=0)


def by_mask(table, window):
    """The order of rows sorted by mask within each `window` consecutive rows, as in sparse_tiles."""
    m = torch.arange(table.shape[1])
    return ((m // window << len(table)) + masks(table)).sort(stable=True)[1]


def morton(coords):
    """The order of rows along a Morton curve, sample by sample."""
    bits = (coords[:, [3, 2, 1], None].long() >> torch.arange(12)) & 1  # [M, 3, 12]
    code = (bits << (3 * torch.arange(12) + torch.arange(3)[:, None])).sum(dim=(1, 2))
    return (code + (coords[:, 0].long() << 40)).argsort()


def tiled(table, order, block_m):
    """The table in T tiles [K, T, block_m], and [K, T] bool: whether a row of the tile has a neighbor at the offset."""
    rows = torch.nn.functional.pad(table[:, order], (0, -len(order) % block_m), value=-1)
    rows = rows.view(len(table), -1, block_m)
    return rows, (rows >= 0).any(dim=2)


def waste_and_reuse(table, order, block_m):
    """The ratios of the module's docstring, for tiles of `block_m` rows."""
    rows, has = tiled(table, order, block_m)
    pairs = (table >= 0).sum().item()
    read = rows.transpose(0, 1).flatten(1).sort(dim=1)[0]  # [T, K * block_m], -1 for none
    distinct = (read[:, 0] >= 0).sum() + ((read[:, 1:] != read[:, :-1]) & (read[:, 1:] >= 0)).sum()
    return has.sum().item() * block_m / pairs, pairs / distinct.item()


def print_orders(all_layers, block_m=64):
    """Print waste and reuse under several orders of the rows; sparse_tiles sorts by mask in windows of WINDOW."""
    orders = {
        "unsorted": lambda table, _: torch.arange(table.shape[1]),
        "Morton": lambda _, coords: morton(coords),
        f"by mask in {sparse_tiles.WINDOW}": lambda table, _: by_mask(table, sparse_tiles.WINDOW),
        "by mask in 4096": lambda table, _: by_mask(table, 4096),
        "by mask": lambda table, _: by_mask(table, 2**40),
    }
    print(f"## Waste / reuse of rows in tiles of {block_m}\n\n| table | pairs per row | {' | '.join(orders)} |")
    print("|" + "---|" * (len(orders) + 2))
    for layer in all_layers[1:]:  # "input" has the table of "stage 1"
        for name, table, coords, *_ in layer.passes():
            if name == "forward" or layer.inverse is not layer.table:  # each table once
                counted = [waste_and_reuse(table, order(table, coords), block_m) for order in orders.values()]
                cells = " | ".join(f"{waste:.2f} / {reuse:.1f}" for waste, reuse in counted)
                print(f"| {layer.name}, {name} | {(table >= 0).sum() / table.shape[1]:.1f} | {cells} |", flush=True)
    print()


# Products and bytes


@dataclass
class Cost:
    waste: float  # products computed / needed
    padded_waste: float  # the same in FLOP: channels are padded to blocks, offsets to whole groups
    bytes_cached: float  # from the L2, if rows read earlier by a tile come from the L1
    bytes_uncached: float  # from the L2, if they do not
    bytes_minimum: float
    programs: int  # of a launch


def gather_gemm(table, c_in, c_out):
    """`Cost` of the forward or of the gradient of the features."""
    (K, M), pairs = table.shape, (table >= 0).sum().item()
    few_rows = M <= sparse_gemm.FEW_ROWS
    blocks = sparse_gemm._blocks(DTYPE, few_rows, c_in, c_out, allow_tf32=False)[0]  # the launch without tuning
    order = by_mask(table, sparse_tiles.WINDOW)
    waste, reuse = waste_and_reuse(table, order, blocks.m)
    count = tiled(table, order, blocks.m)[1].sum(dim=0)  # [T] offsets at which a row of the tile has a neighbor
    # steps: of the kernel's loop, per offset, or with pack > 1 per `pack` offsets; tiles_o: tiles of output channels
    steps, tiles_o = -(-c_in // blocks.i) if blocks.pack == 1 else 1, -(-c_out // blocks.o)
    columns = (-(-count // blocks.pack)).sum().item() * steps * blocks.i  # of the gathered rows, over all tiles
    # int32: the offset and its rows in every step, then the number of offsets and the output rows of each tile
    indices = tiles_o * 4 * (count.sum().item() * (1 + blocks.m) * steps + len(count) * (1 + blocks.m))
    # rest: weights and results
    rows, rest = tiles_o * pairs * c_in * BYTES, (count.sum().item() * c_in + M) * c_out * BYTES
    N = int(table.max()) + 1  # input rows
    return Cost(
        waste=waste,
        padded_waste=columns * blocks.m * tiles_o * blocks.o / (pairs * c_in * c_out),
        bytes_cached=indices + rows / reuse + rest,
        bytes_uncached=indices + rows + rest,
        bytes_minimum=4 * pairs + (N * c_in + (K * c_in + M) * c_out) * BYTES,
        programs=len(count) * tiles_o,
    )


def d_weight_of_groups(table, c_in, c_out, layers):
    """`Cost` of the gradient of the weights by groups of offsets, see `sparse_gemm._d_weight_of_groups`: of one of the
    layers whose gradients one launch computes; programs of the launch."""
    (K, M), pairs = table.shape, (table >= 0).sum().item()
    group, block_r = sparse_gemm.GROUP_OF[c_in], sparse_gemm.BLOCK_R
    # a program sums one part of the rows for one group of offsets
    groups, parts = -(-K // group), -(-M // sparse_gemm._group_rows(K, M, c_in, layers))
    # if the L1 hits: for one block of outputs, a row that several offsets of a group read comes from the L2 once
    rows_read = sum(
        (of_group >= 0).sum().item() / waste_and_reuse(of_group, torch.arange(M), block_r)[1]
        for of_group in table.split(group)
    )
    # the table (int32), the gradients of the outputs, and sums (fp32): of each part written and read, the total written
    rest = 4 * K * M + groups * M * c_out * BYTES + (2 * parts + 1) * 4 * K * c_in * c_out
    waste = -(-M // block_r) * block_r * K / pairs
    return Cost(
        waste=waste,
        padded_waste=waste * groups * group / K,
        bytes_cached=rows_read * c_in * BYTES + rest,
        bytes_uncached=pairs * c_in * BYTES + rest,
        bytes_minimum=_d_weight_minimum(table, pairs, c_in, c_out),
        programs=parts * groups * layers,
    )


def _d_weight_minimum(table, pairs, c_in, c_out):
    (K, M), N = table.shape, int(table.max()) + 1  # N input rows
    return 4 * pairs + (N * c_in + M * c_out) * BYTES + 4 * K * c_in * c_out


def d_weight(table, c_in, c_out, layers):
    """`Cost` of the gradient of the weights by chunks of pairs, see `sparse_gemm.d_weight_of`; likewise."""
    (K, M), counts = table.shape, (table >= 0).sum(dim=1)
    pairs, block_r = counts.sum().item(), sparse_gemm.BLOCK_R
    max_block = sparse_gemm._limits(DTYPE, c_in, c_out, allow_tf32=False)[1]
    block_i, block_o = (sparse_gemm._block(c, max_block) for c in (c_in, c_out))
    tiles_i, tiles_o = -(-c_in // block_i), -(-c_out // block_o)
    max_chunks = sparse_gemm._max_chunks(K, M, c_in, c_out, tiles_i * tiles_o, layers)
    length = max(-(-pairs // max_chunks), sparse_gemm.MIN_PAIRS)
    length = -(-length // (2 * block_r)) * 2 * block_r  # pairs per chunk, a multiple of 2 * block_r
    chunks = (-(-counts // length)).sum().item()
    rows = (-(-counts // block_r)).sum().item() * block_r  # pairs, padded to blocks
    sums = (2 * chunks + K) * 4 * c_in * c_out  # fp32: of each chunk written and read, the totals written
    # per pair and tile two indices (int32) and the channels of both rows
    moved = pairs * (8 * tiles_i * tiles_o + BYTES * (c_in * tiles_o + c_out * tiles_i)) + sums
    return Cost(
        waste=rows / pairs,
        padded_waste=rows * tiles_i * block_i * tiles_o * block_o / (pairs * c_in * c_out),
        bytes_cached=moved,  # at one offset no row is read twice
        bytes_uncached=moved,
        bytes_minimum=_d_weight_minimum(table, pairs, c_in, c_out),
        programs=chunks * tiles_i * tiles_o * layers,
    )


def print_layers(all_layers):
    print("## Products relative to those needed, and MB from the L2 compared with the minimum\n")
    columns = ["layer, channels", "pass", "GFLOP needed", "waste", "with padding", "MB, L1 hits", "MB, L1 misses"]
    print(f"| {' | '.join(columns)} | minimum MB | programs |")
    print("|---|---|---|---|---|---|---|---|---|")
    total = torch.zeros(5, dtype=torch.float64)
    for layer in all_layers:
        gflop = 2e-9 * (layer.table >= 0).sum().item() * layer.c_in * layer.c_out
        label = f"{layer.name}, {layer.c_in} to {layer.c_out}" + (f", x {layer.times}" if layer.times > 1 else "")
        costs = {name: gather_gemm(table, c_in, c_out) for name, table, _, c_in, c_out in layer.passes()}
        grouped = sparse_gemm._in_groups(DTYPE, len(layer.table), layer.c_in, layer.c_out, layer.inverse is layer.table)
        count_d_weight = d_weight_of_groups if grouped else d_weight
        alike = min(layer.times, MAX_ALIKE)  # in one launch
        costs["d_weight"] = count_d_weight(layer.table, layer.c_in, layer.c_out, alike)
        for name, c in costs.items():
            mb = torch.tensor([c.bytes_cached, c.bytes_uncached, c.bytes_minimum], dtype=torch.float64) / 1e6
            total += layer.times * torch.cat([torch.tensor([gflop, gflop * c.padded_waste]), mb])
            cells = " | ".join(f"{value:.1f}" for value in mb)
            print(f"| {label} | {name} | {gflop:.2f} | {c.waste:.2f} | {c.padded_waste:.2f} | {cells} | {c.programs} |")
    gflop, computed, cached, uncached, minimum = total.tolist()
    print(f"\nForward and backward of all: {gflop:.0f} GFLOP needed, {computed:.0f} computed; ", end="")
    print(f"{cached:.0f} MB if the L1 hits, {uncached:.0f} MB if it misses, minimum {minimum:.0f} MB.")
    tables = {id(t): t.nbytes for layer in all_layers for t in (layer.table, layer.inverse)}
    print(f"Size of the tables, each of which is read once to make its tiles: {sum(tables.values()) / 1e6:.0f} MB.\n")


# Machine code


def print_kernels():
    if importlib.util.find_spec("pytest") is None:
        return print("The machine code is left out: pip install -e '.[test]' first.")
    ahead_of_time = importlib.import_module("tests.ahead_of_time")
    print(
        f"## Machine code for sm_90\n\n| kernel | element | blocks | registers | stack | shared | {' | '.join(KINDS)} |"
    )
    print("|" + "---|" * (6 + len(KINDS)))
    for file in ("sparse_tiles", "sparse_gemm"):
        module = importlib.import_module(f"unipad.kernels.{file}")
        for launch in importlib.import_module(f"tests.kernels.test_{file}").LAUNCHES:
            for element in launch.elements:
                compiled = ahead_of_time.compile_launch(getattr(module, launch.kernel), launch, element, "sm_90")
                cost, kinds = ahead_of_time._cost(compiled, ""), ahead_of_time.instructions(compiled, *KINDS)
                shown = {k: v for k, v in launch.constexprs.items() if k not in HIDDEN and v not in (None, False)}
                blocks = ", ".join(f"{k.removeprefix('BLOCK_')} {v}" for k, v in shown.items())
                used = " | ".join(str(cost[k]) for k in ("registers", "stack", "shared"))
                counted = " | ".join(str(n) for n in kinds.values())
                print(f"| {launch.kernel} | {element} | {blocks} | {used} | {counted} |", flush=True)


if __name__ == "__main__":
    all_layers = layers()
    print("| stage | voxels | voxels, nuScenes | neighbors of 27 | neighbors, nuScenes |\n|---|---|---|---|---|")
    stages = [layer for layer in all_layers if layer.name.startswith("stage")]
    for layer, (N, neighbors) in zip(stages, NUSCENES, strict=True):
        pairs, M = (layer.table >= 0).sum().item(), layer.table.shape[1]
        print(f"| {layer.name[-1]} | {M} | {N:.0f} | {pairs / M:.1f} | {neighbors} |")
    print()
    print_orders(all_layers)
    print_layers(all_layers)
    print_kernels()
