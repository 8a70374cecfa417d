"""Machine code of the fused renderer's kernels: warp instructions per sample, registers, stack, shared memory; their
programs.

    python -m benchmarks.count_sdf_render
    python -m benchmarks.count_sdf_render --target sm_80

Compiles ahead of time and needs no GPU, but the test dependencies (pip install -e '.[test]'): launches are rows of
`LAUNCHES` of tests/kernels/test_sdf_render.py and test_sdf_backward.py, with the field of every preset. A warp
instruction is one that the 32 threads of a warp execute together. The count is that of the SASS instructions, each
times the trips of the loops around it and the warps of a program, on `RAYS` rays of `SAMPLES` samples, over all
samples. Both sides of a branch count, subroutines (64-bit division) do not. It says nothing about stalls: a kernel with
fewer instructions may be slower.

"programs" is the number of programs of each launch on a GPU with `MULTIPROCESSORS`. As many run at once as the
registers allow: "busy" is the percentage of these places that are in use, if all rays take equally long. "MB" is the
size of the partial sums of gradients, which are zeroed before and summed after.
"""

import argparse
import importlib
import re

from unipad.kernels import sdf_backward, sdf_render
from unipad.kernels.backend import triton
from unipad.kernels.sdf_field import programs_for

RAYS, SAMPLES, SEARCHED = 3072, 96, 72  # rays of camera-0.1; samples per ray; `sdf_values` looks up fewer
MULTIPROCESSORS = 132  # of an H100; the number of programs depends on it
REGISTERS = 65536  # of a multiprocessor
PASSES = {  # kernels of each pass; the search for the surface along rays, before it, is not part of the forward
    "search": ("_sdf_values_kernel",),
    "forward": ("_sdf_render_fwd_kernel",),
    "backward": ("_sdf_render_bwd_rgb_kernel", "_sdf_render_bwd_sdf_kernel"),
}


def counted_launches():
    """(mode, launch) of each kernel with the presets' field in training; mode: "tf32", or "exact" in tf32x3."""
    found = {}
    for file in ("sdf_render", "sdf_backward"):
        for launch in importlib.import_module(f"tests.kernels.test_{file}").LAUNCHES:
            given = launch.constexprs
            of_presets = given["C"] == 32 and given.get("RGB_LAYERS", 4) == 4 and not given.get("STOP")
            mode = {"tf32": "tf32", "tf32x3": "exact"}.get(given["PREC"])
            if of_presets and mode and given.get("SCATTER", True):
                found.setdefault((launch.kernel, mode), launch)
    names = [kernel for kernels in PASSES.values() for kernel in kernels]
    return sorted(((mode, launch) for (_, mode), launch in found.items()), key=lambda row: names.index(row[1].kernel))


def count(launch, target):
    """Resources of a launch, and its warp instructions per sample ("instructions")."""
    from tests import ahead_of_time

    kernel = getattr(sdf_render, launch.kernel, None) or getattr(sdf_backward, launch.kernel)
    compiled = ahead_of_time.compile_launch(kernel, launch, "fp32", target)
    programs, samples, loops = _work(launch)
    sass = ahead_of_time._dump(compiled, "nvdisasm", "-c")
    per_program = instructions(sass, compiled.asm["ttgir"], loops) * launch.num_warps
    cost = ahead_of_time._cost(compiled, "") | dict(instructions=per_program * programs / samples)
    return cost | _programs(launch, programs, cost["registers"])


def _programs(launch, programs, registers):
    """The header's "programs", "busy" and "MB"."""
    given, kernel = launch.constexprs, launch.kernel
    tiles = triton.cdiv(SAMPLES, given.get("BLOCK_S", SAMPLES))  # per ray
    # what the programs share out among them: rays or tiles
    pieces = {"_sdf_render_bwd_rgb_kernel": RAYS, "_sdf_render_bwd_sdf_kernel": RAYS * tiles}.get(kernel, programs)
    warps = REGISTERS // (32 * triton.cdiv(registers, 8) * 8)  # of a multiprocessor
    at_once = min(programs, MULTIPROCESSORS * min(32, warps // launch.num_warps))
    one_by_one = triton.cdiv(programs, at_once) * triton.cdiv(pieces, programs)
    rows, stride = given["H"] * given.get("SDF_LAYERS", 0) + 1, given["C"] + given["H"] + 16
    if "rgb" in kernel:
        rows, stride = given["H"] * (given["RGB_LAYERS"] - 1) + 16, stride + given["H"]
    partial_sums = 4e-6 * programs * rows * stride if "bwd" in kernel else 0
    return dict(programs=programs, busy=100 * pieces / (one_by_one * at_once), MB=partial_sums)


def _work(launch):
    """(number of programs, samples of all, trips per program of the loops whose bounds are not constants)."""
    given = launch.constexprs
    if launch.kernel == "_sdf_values_kernel":  # a tile per program
        return triton.cdiv(RAYS * SEARCHED, given["BLOCK_M"]), RAYS * SEARCHED, []
    tiles = triton.cdiv(SAMPLES, given["BLOCK_S"])  # per ray
    if launch.kernel == "_sdf_render_fwd_kernel":  # a ray per program
        return RAYS, RAYS * SAMPLES, [tiles]
    if launch.kernel == "_sdf_render_bwd_rgb_kernel":
        programs = programs_for(RAYS, MULTIPROCESSORS, launch.num_warps)
        return programs, RAYS * SAMPLES, [RAYS / programs, tiles]
    programs = programs_for(RAYS * tiles, MULTIPROCESSORS, launch.num_warps)
    return programs, RAYS * SAMPLES, [RAYS * tiles / programs]


def instructions(sass, ttgir, trips):
    """Warp instructions that one warp executes.

    trips: of the loops without constant bounds, in order of the source. Loops of the SASS are matched with those of the
    TTGIR by their order and nesting, which must agree; the TTGIR may have more, since compilers unroll short loops.
    """
    in_source, in_code = _source_loops(ttgir), _sass_loops(sass)
    while len(in_source) > len(in_code):
        shortest = min((row for row in in_source if row[1]), key=lambda row: row[1], default=None)
        assert shortest, "the machine code lacks a loop of unknown length: this compiler's code cannot be counted"
        in_source.remove(shortest)
    same = [depth for depth, _ in in_source] == [depth for depth, *_ in in_code]
    assert same, "loops of the machine code are nested differently: this compiler's code cannot be counted"
    trips = iter(trips)
    counts = [next(trips) if n is None else n for _, n in in_source]
    assert next(trips, None) is None, "fewer loops than trips"
    total = 0
    for i, line in enumerate(_lines(sass)):
        weight = 1 if re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line) else 0
        for (_, first, last), n in zip(in_code, counts, strict=True):
            weight *= n if first <= i <= last else 1
        total += weight
    return total


def _source_loops(ttgir):
    """(nesting depth, trips or None) of each loop of the TTGIR, in order."""
    constants = {name: int(value) for name, value in re.findall(r"(%c\S+) = arith.constant (-?\d+) : i\d+", ttgir)}
    loops, open_loops = [], []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        inside = not line.strip() or line.lstrip().startswith(("} do {", "^"))  # the middle of a `scf.while`
        while open_loops and indent <= open_loops[-1] and not inside:
            open_loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            bounds = re.search(r"scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)", line)
            low, high, step = (constants.get(name) for name in bounds.groups()) if bounds else (None, None, None)
            loops.append((len(open_loops), None if None in (low, high, step) else len(range(low, high, step))))
            open_loops.append(indent)
    return loops


def _lines(sass):
    """Lines of the kernel, without its subroutines and the endless loop that pads its end."""
    lines = sass.split("\n")
    end = next((i for i, line in enumerate(lines) if "$__internal" in line and line.endswith(":")), len(lines))
    return lines[:end]


def _sass_loops(sass):
    """(nesting depth, first line, last line) of each loop of the SASS, in order: what a branch backwards encloses."""
    labels, loops = {}, {}
    for i, line in enumerate(_lines(sass)):
        if label := re.match(r"(\.L_\S+):", line):
            labels[label[1]] = i
        elif (branch := re.search(r"\bBRA\S*.*`\((\.L_\S+)\)", line)) and labels.get(branch[1], i) < i - 1:
            loops[labels[branch[1]]] = i  # several branches to one label are one loop
    spans = sorted(loops.items())
    return [(sum(a < first and last < b for a, b in spans), first, last) for first, last in spans]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90", help="as in tests/ahead_of_time.py; default: sm_90")
    parser.add_argument("--products", choices=("tf32", "exact"), help="only these; default: both")
    args, totals = parser.parse_args(), {}
    target = args.target
    columns = "instructions", "stack", "registers", "shared", "programs", "busy", "MB"
    print(f"| kernel, {target} | products | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for mode, launch in counted_launches():
        if args.products not in (None, mode):
            continue
        counted = count(launch, target)
        print(f"| {launch.kernel} | {mode} | {' | '.join(f'{counted[c]:.0f}' for c in columns)} |", flush=True)
        which = next(name for name, kernels in PASSES.items() if launch.kernel in kernels)
        totals[mode, which] = totals.get((mode, which), 0) + counted["instructions"]
    print("\nWarp instructions per sample: ", end="")
    print("; ".join(f"{which} {mode} {total:.0f}" for (mode, which), total in sorted(totals.items())))
