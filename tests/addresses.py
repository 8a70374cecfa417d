"""Find int32 products in a kernel's address arithmetic, from its TTIR.

An offset multiplied in int32 overflows for tensors of more than 2^31 elements, which the tests are too small to notice:
kernels must widen to int64 before the product. Every pointer offset is traced back to the values that it is computed
from. An int32 product among them is an error, unless both factors are bounded at compile time (`tl.arange`, block
sizes), or one factor is and the other is a block index (a program id, or the counter of a loop over `cdiv(size,
block)`): block index times block size is at most a size, and sizes are int32. `KNOWN_SMALL` lists products that stay
below 2^31 for other reasons.

Tracing stops at values loaded from memory or converted from floats, and ignores conditions (masks, branches). int32
sums are not checked.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

# File -> part of a source line -> what its product is, or why it stays below 2^31. Triton merges equal products, so the
# line may be the first one that contains the product (a mask, say) rather than the address. Products in loop bounds are
# reported too: an address depends on them through the loop's counter. For loops that are unrolled, Triton makes such
# products itself. "Offsets" in sparse_gemm.py are those of a convolution's kernel.
KNOWN_SMALL = {
    "lift.py": {
        "V = shape[0] * shape[1] * shape[2]": "lift asserts views x voxels < 2^30",
        "i = (z * shape[1] + y) * shape[0] + x": "voxel index; lift asserts voxels < 2^30",
        "block // (along_x * along_y)": "blocks per slice, at most the number of programs",
    },
    "pixel_sum.py": {
        "quad = p - up * w": "0 or the width of an image: `up` is 0 or 1",
        "hit // V // N % B * V + hit % V": "voxel index; lift asserts voxels < 2^30",
    },
    "rotated_iou.py": {"word * 32 + k": "box index"},
    "sdf_backward.py": {
        "i) * BLOCK_S": "index of a sample on its ray",
        "tile % tiles * BLOCK_S": "index of a sample on its ray",
        "R * tiles": "sdf_render asserts samples < 2^30, and a tile has a sample",
    },
    "sdf_gather.py": {
        "((volume_idx * Z + z) * Y + y) * X + x": "voxel index; sdf_render asserts voxels < 2^31",
        "cell[0] + upper_z * STEP_Z": "voxel index",
    },
    "sdf_render.py": {"tile * BLOCK_S": "index of a sample on its ray"},
    "sparse_gemm.py": {
        "e < O * I": "weights of one offset",
        "slot * BLOCK_M": "entries of one tile: offsets x rows",
        "slot[None, :] * BLOCK_M": "entries of one tile: offsets x rows",
        "slot_p * BLOCK_M": "entries of one tile: offsets x rows",
        "count * STEPS": "steps of the loop over one tile: offsets x channel blocks",
        "r * BLOCK_R": "position among the (input row, output row) pairs of one chunk",
    },
    "sparse_tiles.py": {"size = size * 2": "a power of two, at most twice the rows of a window"},
    "trilinear.py": {"2 * C": "channels are few", "2 * upper - 1": "-1 or 1"},
    "voxel_pool.py": {
        "p = r * D + k": "point index; voxel_pool asserts points < 2^30",
        "chunk * CHUNK": "position in the list of runs (points of a ray in one voxel); no more than points",
        "first * CHUNK": "position in the list of runs",
        "whole * (CHUNK - 1)": "runs of one voxel",
        "range(0, tl.max(terms, axis=0)": "bound of an unrolled loop: runs of one voxel",
        "range(0, D": "bound of an unrolled loop: depth bins along the ray of a pixel",
    },
}

# An SSA value
VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
# A line with an op; groups: name of its result, how many results it has, name of the op, the rest of the line
OP = re.compile(r'^\s*(?:(%[\w.]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
# Ops at which tracing stops
OPAQUE = {"tt.load", "tt.atomic_rmw", "tt.atomic_cas", "arith.cmpi", "arith.cmpf", "arith.fptosi", "arith.fptoui"}


@dataclass
class Op:
    """What defines a value: an op of the TTIR, or a loop that carries it ("carried") or counts with it ("counter")."""

    name: str
    operands: list  # names of values; of a counter: start, end and step
    text: str = ""  # the line after the op's name
    sources: list = field(default_factory=list)  # values its result derives from: operands, or what its regions yield


def int32_products(ttir):
    """Every int32 product in an address that is not in `KNOWN_SMALL`, as "file.py: source line"."""
    ops, addresses = _read(ttir)
    seen, products, pending = set(), set(), list(addresses)
    while pending:
        value = pending.pop()
        if value in seen or value not in ops:
            continue
        seen.add(value)
        op = ops[value]
        pending += op.sources
        if op.name == "arith.muli" and re.search(r": (i32|tensor<[\dx]+xi32>)", op.text):
            kinds = {_kind(v, ops) for v in op.operands}
            if "constant" not in kinds or not kinds <= {"constant", "block"}:
                products.add(_source(op.text, ttir))
    unknown = [(file, line) for file, line in products if not any(known in line for known in KNOWN_SMALL.get(file, ()))]
    return sorted(f"{file}: {line}" for file, line in unknown)


def _read(ttir):
    """The `Op` that defines each value, by name of the value, and the values used as pointer offsets."""
    ops, addresses = {}, []
    regions = []  # one per enclosing op: (its results, the values that a loop carries)
    for line in ttir.splitlines():
        parsed = OP.match(line)
        closes, opens = line.lstrip().startswith("}"), line.split(" loc(")[0].rstrip().endswith(("{", "({"))
        if closes and not opens and regions:  # `} else {` and `} do {` stay in the same op
            regions.pop()
        if not parsed:
            continue
        result, count, name, rest = parsed.groups()
        head = rest.split(" : ")[0].split(" loc(")[0]
        operands = VALUE.findall(head)
        results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
        carried = []
        if name in ("scf.yield", "scf.condition"):
            yielded = operands[name == "scf.condition" :]  # without the condition itself
            for targets in regions[-1] if regions else ():
                for target, value in zip(targets, yielded, strict=False):
                    ops[target].sources.append(value)
        elif name in ("scf.for", "scf.while"):
            carried, inits = _pairs(rest)
            for target, init in zip(carried, inits, strict=True):
                ops[target] = Op("carried", [], sources=[init])
            if name == "scf.for":
                ops[operands[0]] = Op("counter", operands[1:4], sources=operands[1:4])
        elif name == "tt.addptr":
            addresses.append(operands[1])
        for r in results:
            follow = [] if name in OPAQUE or name.startswith("scf.") else operands
            if name == "arith.select":
                follow = operands[1:]
            ops[r] = Op(name, operands, rest, list(follow))
        if opens and not closes:
            regions.append((results, carried))
    return ops, addresses


def _pairs(text):
    """Names and initial values of the variables that a loop carries: (%a = %b, ...)."""
    listed = re.search(r"(?:iter_args)?\(((?:%[\w.]+ = [^,)]+(?:, )?)+)\)", text)
    pairs = re.findall(r"(%[\w.]+) = (%[\w.#]+)", listed[1]) if listed else []
    return [a for a, _ in pairs], [b for _, b in pairs]


def _kind(value, ops):
    """The class of a value: "constant" (bounded at compile time), "block" (a block index) or None (anything else)."""
    op = ops.get(value)
    if op is None:
        return None
    kinds = [_kind(v, ops) for v in op.operands]
    match op.name:
        case "arith.constant" | "tt.make_range" | "arith.cmpi":  # a comparison is 0 or 1
            return "constant"
        case "tt.get_program_id":
            return "block"
        case "counter":
            end = ops.get(op.operands[1])
            in_blocks = end and end.name == "arith.divsi" and _kind(end.operands[1], ops) == "constant"  # a cdiv
            return "constant" if set(kinds) == {"constant"} else "block" if in_blocks else None
        case "arith.remsi" | "arith.andi" if kinds[1] == "constant":
            return "constant"
        case "arith.remsi" | "arith.divsi" | "arith.shrsi" | "tt.splat" | "tt.broadcast" | "tt.expand_dims":
            return kinds[0]
        case "arith.extui" | "arith.extsi" | "tt.reshape" | "tt.trans":
            return kinds[0]
        case "arith.addi" | "arith.subi" | "arith.muli" | "arith.minsi" | "arith.maxsi":
            return "constant" if set(kinds) == {"constant"} else None
    return None


def _source(text, ttir):
    """File name and source line of an op; if it was inlined, of the innermost function that contains it."""
    alias = re.search(r"loc\((#loc\d*)\)\s*$", text)[1]
    for _ in range(8):  # a location may refer to others, e.g. to the call site of an inlined function
        body = re.search(rf"^{alias} = loc\((.*)\)$", ttir, re.MULTILINE)[1]
        position = re.search(r'"([^"]+\.py)":(\d+):', body)
        if position:
            break
        alias = re.search(r"#loc\d*", body)[0]
    # a cached TTIR may name another checkout that had the same source, even a removed one
    file = Path(__file__).parents[1] / Path(position[1]).parent.name / Path(position[1]).name
    return file.name, file.read_text().splitlines()[int(position[2]) - 1].strip()
