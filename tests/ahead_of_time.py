"""Compile kernels for GPUs that this machine does not have, and read their resource use from the machine code.

    python -m tests.ahead_of_time composite        the first launch of each kernel in each element type, for sm_90
    python -m tests.ahead_of_time composite sm_80  all `LAUNCHES` of tests/kernels/test_composite.py, for sm_80

Prints one JSON line for each. Must run without TRITON_INTERPRET, so tests start it as a process. No GPU is needed:
Triton ships the assemblers.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from tests.addresses import int32_products

TARGETS = {f"sm_{arch}": ("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)} | {"gfx942": ("hip", "gfx942", 64)}
# Bytes of shared memory per program, at most: CUDA programming guide; LDS of the MI300
MAX_SHARED = dict(sm_80=166_912, sm_86=101_376, sm_89=101_376, sm_90=232_448, sm_100=232_448, sm_120=101_376)
MAX_SHARED |= dict(gfx942=65_536)
NVIDIA, AMD = tuple(target for target in TARGETS if target != "gfx942"), ("gfx942",)
# Compiled to machine code; for other targets, unless a launch has limits on them, compilation stops once shared memory
# is allocated
ASSEMBLED_TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Launch:
    """One way the code launches a kernel, and the resources it may use on the targets of `limits_on`.

    Types of runtime arguments follow from their names: `*_idx_ptr` points to int32, any other `*_ptr` to the element
    type; UPPER CASE sizes are int32, other scalars fp32. `types` overrides these.
    """

    kernel: str
    constexprs: dict = field(default_factory=dict)
    types: dict = field(default_factory=dict)  # argument -> "i64", "*fp32", "*" (to the element type) or a tuple
    divisible: tuple = ()  # sizes that are multiples of 16 in this launch; Triton specializes on them
    elements: tuple = ("fp32", "bf16")  # element types to compile for
    targets: tuple = tuple(TARGETS)  # to compile for
    num_warps: int = 4
    num_stages: int | dict | None = None  # None: the target's default; a dict: vendor -> number
    registers: int = 255  # at most, per thread
    shared: int = 0  # at most, bytes per program
    stack: int = 0  # at most, bytes per thread; above 0 means spills and needs a comment that says why
    mma: str = ""  # the matrix instruction that sm_90's machine code must have, "HGMMA" or "HMMA"; others have HMMA
    limits_on: tuple = ("sm_90",)  # targets whose limits are asserted; on AMD only `stack`

    def matrix_instruction(self, target):
        """The matrix instruction that the machine code for an NVIDIA `target` must have, "" for none."""
        return "HMMA" if self.mma and target in ("sm_80", "sm_120") else self.mma


def launches_of(kernel_file, which):
    """(launch, element type, target) for the LAUNCHES of tests/kernels/test_<kernel_file>.py.

    which: one of TARGETS, for all launches; or "first": of each kernel, only the first launch with sm_90 in its
        `limits_on`, for sm_90.
    """
    launches = importlib.import_module(f"tests.kernels.test_{kernel_file}").LAUNCHES
    if which == "first":  # reversed: the first launch of a kernel is the last written into the dict
        launches = {launch.kernel: launch for launch in reversed(launches) if "sm_90" in launch.limits_on}.values()
    target = "sm_90" if which == "first" else which
    return [(launch, element, target) for launch in launches if target in launch.targets for element in launch.elements]


def compile_launches(kernel_file, which="first"):
    """Print a JSON line for each of `launches_of`: shared memory, and on targets in the launch's `limits_on` what
    `_cost` reads. For these and ASSEMBLED_TARGETS, the line also has the launch's `int32_products`.
    """
    module = importlib.import_module(f"unipad.kernels.{kernel_file}")
    for launch, element, target in launches_of(kernel_file, which):
        kernel = getattr(module, launch.kernel)
        if target in ASSEMBLED_TARGETS or target in launch.limits_on:
            compiled = compile_launch(kernel, launch, element, target)
            cost = {"shared": compiled.metadata.shared, "int32_products": int32_products(compiled.asm["ttir"])}
            cost |= _cost(compiled, launch.matrix_instruction(target)) if target in launch.limits_on else {}
        else:
            cost = {"shared": shared_of(kernel, launch, element, target)}
        print(json.dumps(dict(kernel=launch.kernel, element=element, target=target, **cost)), flush=True)


class _Allocated(Exception):
    """Ends a compilation as soon as shared memory is allocated."""


def shared_of(kernel, launch, element, target):
    """Bytes of shared memory per program. Stops before the assembler, which need not support the target."""
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.nvidia.compiler import CUDABackend

    def stop(self, src, metadata, *_):
        raise _Allocated(metadata["shared"])

    try:
        with mock.patch.object(CUDABackend, "make_ptx", stop), mock.patch.object(HIPBackend, "make_amdgcn", stop):
            return compile_launch(kernel, launch, element, target).metadata.shared  # returns only if Triton cached it
    except _Allocated as allocated:
        return allocated.args[0]


def compile_launch(kernel, launch, element, target):
    """Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {a: _type(a, launch, element) for a in kernel.arg_names}
    aligned = [
        path
        for i, name in enumerate(kernel.arg_names)
        for path, type_ in _paths(signature[name], (i,))
        if type_.startswith("*") or name in launch.divisible
    ]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(a),): v for a, v in launch.constexprs.items()},
        {path: [["tt.divisibility", 16]] for path in aligned},
    )
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}  # True: default of `backend.jit`
    if launch.num_stages is not None:
        vendor, stages = "amd" if target in AMD else "nvidia", launch.num_stages
        options["num_stages"] = stages[vendor] if isinstance(stages, dict) else stages
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _type(name, launch, element):
    """Triton's name of an argument's type, or a tuple of them."""
    if name in launch.constexprs:
        return "constexpr"
    if name in launch.types:
        return _of_element(launch.types[name], element)
    if name.endswith("_ptr"):
        return "*i32" if name.endswith("_idx_ptr") else f"*{element}"
    return "i32" if name.isupper() else "fp32"


def _of_element(type_, element):
    """A type of `Launch.types`, with "*" replaced by a pointer to the element type."""
    if isinstance(type_, tuple):
        return tuple(_of_element(t, element) for t in type_)
    return f"*{element}" if type_ == "*" else type_


def _paths(type_, path):
    """(path, type) of every scalar in an argument's type; Triton's paths are (argument, position in the tuple, ...)."""
    if isinstance(type_, tuple):
        for i, t in enumerate(type_):
            yield from _paths(t, (*path, i))
    else:
        yield path, type_


def _cost(compiled, mma):
    """Registers and stack bytes per thread, shared bytes per program, and "mma": `mma` if the machine code has this
    instruction, else "". On AMD's targets only the stack.
    """
    if "amdgcn" in compiled.asm:
        return {"stack": int(re.search(r"\.private_segment_fixed_size: +(\d+)", compiled.asm["amdgcn"])[1])}
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(compiled, "cuobjdump", "--dump-resource-usage")))
    return {
        "registers": int(used["REG"]),
        "stack": max(int(used["STACK"]), int(used["LOCAL"])),
        "shared": compiled.metadata.shared,
        "mma": mma if mma and instructions(compiled, mma)[mma] else "",
    }


def instructions(compiled, *kinds):
    """Number of instructions of each kind ("HGMMA", "LDGSTS", ...) in the machine code for an NVIDIA target."""
    code = _dump(compiled, "nvdisasm", "-c")
    return {kind: len(re.findall(rf"\b{kind}\b", code)) for kind in kinds}


def _dump(compiled, tool, option):
    """What one of NVIDIA's binary utilities prints about the machine code."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    compile_launches(*sys.argv[1:])
