"""sparse_conv on the LiDAR recipe's encoder, counted: products and bytes against the least, and the machine code.

    python -m benchmarks.count_sparse_conv      needs no GPU: voxels come from benchmarks/lidar_scene.py

A product is one row times one [Cin, Cout] matrix. "waste": products done over those that pairs of voxels need; a tile
multiplies all its rows at every offset that one of them has. "reuse": pairs over the distinct rows that a tile reads.
Bytes are what the multiprocessors ask of the L2, whose copy asynchronous loads of 16 bytes take past the L1: indices,
gathered rows, weights and results. The least reads every row, weight and index of a pair once.
"""

import importlib
import os
from dataclasses import dataclass

import torch

from benchmarks.lidar_scene import NUSCENES, SHAPE, STAGES, voxels
from kernels import sparse_conv, sparse_tiles
from kernels.sparse_map import inverse_map, out_shape, sort_voxels, strided_map, submanifold_map

WIDTHS, BLOCKS = (16, 32, 64, 128), 2
DTYPE, BYTES = torch.bfloat16, 2
KINDS = "HGMMA", "HMMA", "FFMA", "LDGSTS", "LDG"


@dataclass
class Layer:
    name: str
    table: torch.Tensor  # [K, M] of the forward
    inverse: torch.Tensor  # [K, N] of the gradient of the features
    out_coords: torch.Tensor  # [M, 4]
    coords: torch.Tensor  # [N, 4]
    c_in: int
    c_out: int
    times: int = 1  # in the encoder

    def passes(self):
        """(pass, table, coordinates of its rows, channels read, channels written)."""
        yield "forward", self.table, self.out_coords, self.c_in, self.c_out
        if self.c_in > 5:  # nobody asks for the gradient of the points
            yield "d_features", self.inverse, self.coords, self.c_out, self.c_in


def layers():
    coords, shape = voxels(), SHAPE
    coords = coords[sort_voxels(coords, shape)[1]]
    found = []
    for i, width in enumerate(WIDTHS):
        if i:
            out_coords, table = strided_map(coords, shape, *STAGES[i - 1])
            inverse = inverse_map(table, len(coords))
            found.append(Layer(f"down {i}", table, inverse, out_coords, coords, WIDTHS[i - 1], width))
            coords, shape = out_coords, out_shape(shape, *STAGES[i - 1])
        table = submanifold_map(coords, *sort_voxels(coords, shape), shape, (3, 3, 3), (1, 1, 1))
        if not i:
            found.append(Layer("input", table, table.flip(0), coords, coords, 5, width))
        found.append(Layer(f"stage {i + 1}", table, table.flip(0), coords, coords, width, width, 2 * BLOCKS))
    return found


# Row orders


def masks(table):
    """[M] int64, bit k: whether a row has a neighbour at offset k."""
    return ((table >= 0).long() << torch.arange(len(table))[:, None]).sum(dim=0)


def by_mask(table, window):
    """The order of rows sorted by mask among each `window` of them, as sparse_tiles sorts."""
    place = torch.arange(table.shape[1])
    return ((place // window << len(table)) + masks(table)).sort(stable=True)[1]


def morton(coords):
    bits = (coords[:, [3, 2, 1], None].long() >> torch.arange(12)) & 1  # [M, 3, 12]
    return (
        (bits << (3 * torch.arange(12) + torch.arange(3)[:, None])).sum((1, 2)) + (coords[:, 0].long() << 40)
    ).argsort()


def tiled(table, order, block_m):
    """The table in tiles [K, T, block_m] and which offsets each tile has [K, T]."""
    rows = torch.nn.functional.pad(table[:, order], (0, -len(order) % block_m), value=-1)
    rows = rows.view(len(table), -1, block_m)
    return rows, (rows >= 0).any(dim=2)


def waste_and_reuse(table, order, block_m):
    rows, has = tiled(table, order, block_m)
    pairs = (table >= 0).sum().item()
    read = rows.transpose(0, 1).flatten(1).sort(dim=1)[0]
    distinct = (read[:, 0] >= 0).sum() + ((read[:, 1:] != read[:, :-1]) & (read[:, 1:] >= 0)).sum()
    return has.sum().item() * block_m / pairs, pairs / distinct.item()


def print_orders(found, block_m=64):
    orders = {
        "as the voxels are": lambda table, _: torch.arange(table.shape[1]),
        "Morton": lambda _, coords: morton(coords),
        f"by mask in {sparse_tiles.WINDOW}": lambda table, _: by_mask(table, sparse_tiles.WINDOW),
        "by mask in 4096": lambda table, _: by_mask(table, 4096),
        "by mask": lambda table, _: by_mask(table, 2**40),
    }
    print(f"## Waste / reuse of rows in tiles of {block_m}\n\n| table | pairs a row | {' | '.join(orders)} |")
    print("|" + "---|" * (len(orders) + 2))
    for layer in found[1:]:
        for name, table, coords, *_ in layer.passes():
            if name == "forward" or layer.name.startswith("down"):  # elsewhere the mirror image
                of = [waste_and_reuse(table, order(table, coords), block_m) for order in orders.values()]
                cells = " | ".join(f"{waste:.2f} / {reuse:.1f}" for waste, reuse in of)
                print(f"| {layer.name}, {name} | {(table >= 0).sum() / table.shape[1]:.1f} | {cells} |", flush=True)
    print()


# Products and bytes


def gather_gemm(table, c_in, c_out):
    """(waste, products with the padding of channels over those needed, MB, least MB, tiles)."""
    (K, M), pairs = table.shape, (table >= 0).sum().item()
    blocks = sparse_conv._blocks(DTYPE, M, c_in, c_out, False)[0]
    _, has = tiled(table, by_mask(table, sparse_tiles.WINDOW), blocks.m)
    steps, tiles_o = -(-c_in // blocks.i), -(-c_out // blocks.o)
    count = has.sum(dim=0)
    columns = (-(-count // blocks.pack)).sum().item() * blocks.i * (steps if blocks.pack == 1 else 1)
    products = columns * blocks.m * tiles_o * blocks.o / (pairs * c_in * c_out)
    active = count.sum().item()
    moved = tiles_o * (active * (4 + 4 * blocks.m) * steps + pairs * c_in * BYTES) + 4 * has.shape[1] * (blocks.m + 1)
    moved += active * c_in * c_out * BYTES + M * c_out * BYTES
    least = 4 * pairs + (int(table.max()) + 1) * c_in * BYTES + K * c_in * c_out * BYTES + M * c_out * BYTES
    return active * blocks.m / pairs, products, moved / 1e6, least / 1e6, has.shape[1] * tiles_o


def d_weight(table, c_in, c_out):
    (K, M), counts = table.shape, (table >= 0).sum(dim=1)
    pairs = counts.sum().item()
    most = sparse_conv._limits(DTYPE, c_in, c_out, False)[1]
    block_i, block_o = (sparse_conv._block(c, most) for c in (c_in, c_out))
    tiles_i, tiles_o = -(-c_in // block_i), -(-c_out // block_o)
    parts = sparse_conv._parts(K, M, c_in, c_out, tiles_i * tiles_o)
    size = max(-(-pairs // parts), sparse_conv.LEAST)
    size = -(-size // (2 * sparse_conv.BLOCK_R)) * 2 * sparse_conv.BLOCK_R
    chunks = (-(-counts // size)).sum().item()
    rows = (-(-counts // sparse_conv.BLOCK_R)).sum().item() * sparse_conv.BLOCK_R
    products = rows * tiles_i * block_i * tiles_o * block_o / (pairs * c_in * c_out)
    moved = (
        pairs * (8 * tiles_i * tiles_o + BYTES * (c_in * tiles_o + c_out * tiles_i))
        + (2 * chunks + K) * 4 * c_in * c_out
    )
    least = 4 * pairs + (int(table.max()) + 1) * c_in * BYTES + M * c_out * BYTES + 4 * K * c_in * c_out
    return rows / pairs, products, moved / 1e6, least / 1e6, chunks * tiles_i * tiles_o


def print_layers(found):
    print("## A layer: products over those needed, MB of the L2 over the least\n")
    print("| layer, channels | pass | pairs | GFLOP needed | waste of rows | with padding | MB | least | programs |")
    print("|---|---|---|---|---|---|---|---|---|")
    total = torch.zeros(4, dtype=torch.float64)
    for layer in found:
        pairs = (layer.table >= 0).sum().item()
        rows = [(name, *gather_gemm(table, c_in, c_out)) for name, table, _, c_in, c_out in layer.passes()]
        rows.append(("d_weight", *d_weight(layer.table, layer.c_in, layer.c_out)))
        gflop = 2e-9 * pairs * layer.c_in * layer.c_out
        for name, waste, products, moved, least, programs in rows:
            total += layer.times * torch.tensor([gflop, gflop * products, moved, least], dtype=torch.float64)
            label = f"{layer.name}, {layer.c_in} to {layer.c_out}" + (f", x {layer.times}" if layer.times > 1 else "")
            cells = f"{waste:.2f} | {products:.2f} | {moved:.1f} | {least:.1f} | {programs}"
            print(f"| {label} | {name} | {pairs} | {gflop:.2f} | {cells} |", flush=True)
    gflop, done, moved, least = total.tolist()
    print(
        f"\nForward and backward of all: {gflop:.0f} GFLOP needed, {done:.0f} done; {moved:.0f} MB, least {least:.0f} MB."
    )
    made = sum(layer.table.nbytes for layer in found[1:])
    print(f"Tables of the forward: {made / 1e6:.0f} MB, read once each to make their tiles.\n")


# Machine code


def print_kernels():
    os.environ.pop("TRITON_INTERPRET", None)
    ahead_of_time = importlib.import_module("tests.ahead_of_time")
    print(
        f"## Machine code for sm_90\n\n| kernel | element | blocks | registers | stack | shared | {' | '.join(KINDS)} |"
    )
    print("|" + "---|" * (6 + len(KINDS)))
    for file in ("sparse_tiles", "sparse_conv"):
        module = importlib.import_module(f"kernels.{file}")
        for launch in importlib.import_module(f"tests.kernels.test_{file}").LAUNCHES:
            for element in launch.elements:
                compiled = ahead_of_time.compile_launch(getattr(module, launch.kernel), launch, element, "sm_90")
                cost, kinds = ahead_of_time._cost(compiled, ""), ahead_of_time.instructions(compiled, *KINDS)
                shown = {k: v for k, v in launch.constexprs.items() if k not in ("WIDEN", "LEAST", "SORT", "SHARE")}
                blocks = ", ".join(f"{k.removeprefix('BLOCK_')} {v}" for k, v in shown.items() if v is not None)
                used = " | ".join(str(cost[k]) for k in ("registers", "stack", "shared"))
                counted = " | ".join(str(n) for n in kinds.values())
                print(f"| {launch.kernel} | {element} | {blocks} | {used} | {counted} |", flush=True)


if __name__ == "__main__":
    found = layers()
    print("| stage | voxels | nuScenes | neighbours of 27 | nuScenes |\n|---|---|---|---|---|")
    stages = [layer for layer in found if layer.name.startswith("stage")]
    for layer, (N, neighbours) in zip(stages, NUSCENES, strict=True):
        pairs, M = (layer.table >= 0).sum().item(), layer.table.shape[1]
        print(f"| {layer.name[-1]} | {M} | {N:.0f} | {pairs / M:.1f} | {neighbours} |")
    print()
    print_orders(found)
    print_layers(found)
    print_kernels()
