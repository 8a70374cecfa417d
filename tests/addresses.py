"""Products of 32 bits in a kernel's addresses, found in its TTIR.

An offset that is multiplied in int32 wraps around in tensors of more than 2^31 elements, long before any test would
notice: kernels go to int64 before the product. Here every offset of a pointer is followed back to what it was made of.
A product of 32 bits among that is a fault, unless both factors are known at compile time (lanes, block sizes), or one
is and the other numbers blocks (programs, or a loop over `cdiv(size, block)`): times the block's size it is at most a
size, and sizes are int32. What stays below 2^31 for reasons of its own stands in `SMALL`.

The offsets that a kernel loads are followed no further, nor is what decides (masks, branches); sums of two sizes in
int32 are not looked at.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

SMALL = {  # file -> a piece of the line: why the product stays below 2^31
    "lift.py": {
        "V = shape[0] * shape[1] * shape[2]": "lift asserts that views x voxels are fewer",
        "i = (z * shape[1] + y) * shape[0] + x": "a voxel's number; lift asserts that there are fewer",
        "block // (along_x * along_y)": "blocks of a slice, of which a launch has fewer",
    },
    "pixel_sum.py": {
        "cell = p - up * w": "a row of pixels",
        "hit // V // N % B * V + hit % V": "a voxel's number; lift asserts that there are fewer",
    },
    "rotated_iou.py": {"w * 32 + k": "a box's number"},
    "sdf_field.py": {"tile * BLOCK_S": "a sample's number on its ray"},
    "sparse_gemm.py": {
        "e < O * I": "weights of one offset",
        "place * BLOCK_M": "what a tile reads: offsets x rows",
        "place[None, :] * BLOCK_M": "what a tile reads: offsets x rows",
        "at * BLOCK_M": "what a tile reads: offsets x rows",
        "count * STEPS": "blocks of channels of a tile's offsets",
        "r * BLOCK_R": "pairs of one chunk",
    },
    "sparse_tiles.py": {"size = size * 2": "doubled up to the rows of a window"},
    "trilinear.py": {"2 * C": "channels", "2 * upper - 1": "-1 or 1"},
    "voxel_pool.py": {
        "view * 12": "matrices",
        "p = r * D + k": "a point's number; voxel_pool asserts that there are fewer",
        "chunk * CHUNK": "a point's place in their order",
        "first * CHUNK": "a point's place in their order",
        "whole * (CHUNK - 1)": "points of one voxel",
        "range(0, tl.max(terms, axis=0)": "points of one voxel",
        "range(0, D": "steps along a pixel's ray",
    },
}

VALUE = re.compile(r"%[\w.]+(?:#\d+)?")
OP = re.compile(r'^\s*(?:(%[\w.]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
# Their results are not made of their operands, as far as an address goes
OPAQUE = {"tt.load", "tt.atomic_rmw", "tt.atomic_cas", "arith.cmpi", "arith.cmpf", "arith.fptosi", "arith.fptoui"}


@dataclass
class Op:
    name: str
    operands: list
    text: str = ""
    made_of: list = field(default_factory=list)  # what its result may be: its operands, or what its regions yield


def narrow_products(ttir):
    """ "file.py: source line" of every product of 32 bits that an address is made of and `SMALL` does not know."""
    ops, addresses = _read(ttir)
    seen, found, left = set(), set(), list(addresses)
    while left:
        value = left.pop()
        if value in seen or value not in ops:
            continue
        seen.add(value)
        op = ops[value]
        left += op.made_of
        if op.name == "arith.muli" and re.search(r": (i32|tensor<[\dx]+xi32>)", op.text):
            kinds = {_kind(v, ops) for v in op.operands}
            if "constant" not in kinds or not kinds <= {"constant", "block"}:
                found.add(_source(op.text, ttir))
    return sorted(f"{file}: {line}" for file, line in found if not any(p in line for p in SMALL.get(file, ())))


def _read(ttir):
    """Every value's op by the value's name, and the values that pointers are moved by."""
    ops, addresses = {}, []
    regions = []  # of the ops that are open: (values of their results, values that a loop carries)
    for line in ttir.splitlines():
        parsed = OP.match(line)
        closes, opens = line.lstrip().startswith("}"), line.split(" loc(")[0].rstrip().endswith(("{", "({"))
        if closes and not opens and regions:
            regions.pop()
        if not parsed:
            continue
        result, count, name, rest = parsed.groups()
        head = rest.split(" : ")[0].split(" loc(")[0]
        operands = VALUE.findall(head)
        results = [f"{result}#{i}" for i in range(int(count))] if count else [result] if result else []
        carried = []
        if name in ("scf.yield", "scf.condition"):
            yielded = operands[name == "scf.condition" :]
            for targets in regions[-1] if regions else ():
                for target, value in zip(targets, yielded, strict=False):
                    ops[target].made_of.append(value)
        elif name in ("scf.for", "scf.while"):
            carried, inits = _pairs(rest)
            for target, init in zip(carried, inits, strict=True):
                ops[target] = Op("carried", [], made_of=[init])
            if name == "scf.for":
                ops[operands[0]] = Op("counter", operands[1:4], made_of=operands[1:4])
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
    """Names and first values of what a loop carries: (%a = %b, ...)."""
    listed = re.search(r"(?:iter_args)?\(((?:%[\w.]+ = [^,)]+(?:, )?)+)\)", text)
    pairs = re.findall(r"(%[\w.]+) = (%[\w.#]+)", listed[1]) if listed else []
    return [a for a, _ in pairs], [b for _, b in pairs]


def _kind(value, ops):
    """ "constant": bounded by what the compiler knows; "block": at most a number of blocks; None: any number."""
    op = ops.get(value)
    if op is None:
        return None
    kinds = [_kind(v, ops) for v in op.operands]
    match op.name:
        case "arith.constant" | "tt.make_range" | "arith.cmpi":
            return "constant"
        case "tt.get_program_id":
            return "block"
        case "counter":
            last = ops.get(op.operands[1])
            in_blocks = last and last.name == "arith.divsi" and _kind(last.operands[1], ops) == "constant"
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
    """The file and the line that the op was compiled from; of inlined functions the innermost."""
    alias = re.search(r"loc\((#loc\d*)\)\s*$", text)[1]
    for _ in range(8):
        body = re.search(rf"^{alias} = loc\((.*)\)$", ttir, re.MULTILINE)[1]
        place = re.search(r'"([^"]+\.py)":(\d+):', body)
        if place:
            break
        alias = re.search(r"#loc\d*", body)[0]
    file = Path(place[1])
    return file.name, file.read_text().splitlines()[int(place[2]) - 1].strip()
