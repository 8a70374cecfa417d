"""--compile: which parts of a model run under torch.compile, so that Inductor fuses their elementwise work and norms.

Each part is one graph without a break: it maps tensors to tensors, and the ops of `unipad.kernels` in it are opaque. A
part is compiled in place, so the names in a checkpoint stay the same. Parts are small rather than few: blocks of equal
shapes share one compiled graph, recomputation (--checkpointing) goes block by block, and DistributedDataParallel
reduces the gradients of one part while the next runs. Left out, and why:

    building sparse tables                sizes depend on the data, and the host reads them (`make_tables`); the sparse
                                          convolutions themselves are opaque nodes in the graph of their encoder
    masks, rays, dropout's masks          one `torch.Generator` per sample, which a graph cannot take
    lift, voxel_pool, trilinear, the      our kernels (on a CPU, their references) run between the parts
    renderer
    losses                                the assignment of boxes runs on the host, the rest is small
    single convolutions, linear layers    little to fuse (downsampling, simple depth head, detection head's branches)
    parts with a batch norm, if there     norms wait for the sums of all processes, and graphs compiled for different
    are several processes                 sizes might ask for them in a different order
    validation                            runs `uncompiled`: else it would compile graphs of its own, for a few frames

A forward hook on a part is called as ever, one on a module inside it only if it was registered before the part first
ran. A part cannot be copied or pickled: save its `state_dict`.
"""

import contextlib
import hashlib
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from unipad import kernels
from unipad.errors import UserError
from unipad.model.camera import FPN, Block, LayerNorm2d
from unipad.model.decoder import DecoderLayer
from unipad.model.depth import ASPP, ResidualBlock
from unipad.model.lidar import Second, SecondFPN, SparseEncoder
from unipad.model.norm import SyncedBatchNorm
from unipad.model.unet import Unet
from unipad.model.volume import ConvNormReLU3d, FrameFusion
from unipad.runtime import World

# Class of a part -> torch.compile's `dynamic`. True: the number of voxels or queries changes with every batch. False:
# sizes are compiled in, and another image size compiles again.
PARTS = {
    Block: False,
    LayerNorm2d: False,
    FPN: False,
    ResidualBlock: False,
    ASPP: False,
    Second: False,
    SecondFPN: False,
    FrameFusion: False,
    ConvNormReLU3d: False,
    SparseEncoder: True,
    Unet: True,
    DecoderLayer: True,
}
# The largest number of graphs for one class; above it, a step raises. The blocks of a ConvNeXt need up to 16 for one
# image size: four widths, each with and without drop path, with and without gradients (frozen stages).
MAX_GRAPHS = 64


def compile_parts(net: nn.Module, world: World, backend: str = "inductor"):
    """Compile the parts of `net` in place; each compiles when it first runs.

    backend: of torch.compile; tests use one that needs no C++ compiler.

    Raises `UserError` without a C++ compiler on a CPU.
    """
    if backend == "inductor" and world.device.type == "cpu":
        _require_cxx()
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    # else a graph on disk, of an earlier version of this project, would call an op with the arguments of that version
    torch.compiler.config.cache_key_tag = _kernels_hash()
    # else Inductor chooses between orders of summation by timing them
    torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    torch._dynamo.config.optimize_ddp = False  # it would split graphs into buckets: parts are smaller than one
    parts = parts_of(net, world.size)
    for part in parts:
        # Not `part.compile`: it compiles `Module.__call__`, whose graphs all classes would share, and so their limit.
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=PARTS[type(part)], backend=backend)
    counts = Counter(type(part).__name__ for part in parts)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    world.print0("--compile:", listed or "nothing, since batch norms over several processes are not compiled")


def parts_of(net: nn.Module, processes: int) -> list[nn.Module]:
    """The modules to compile, none of them inside another."""
    parts, inside = [], set()
    for module in net.modules():  # a module comes before those inside it
        if type(module) not in PARTS or module in inside:
            continue
        if processes > 1 and any(isinstance(m, SyncedBatchNorm) for m in module.modules()):
            continue
        parts.append(module)
        inside.update(module.modules())
    return parts


def uncompiled(compiled: bool):
    """Context in which compiled parts run as if they were not; of no effect if nothing is `compiled`."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _kernels_hash():
    """A hash of the source of all ops."""
    files = sorted(Path(kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _require_cxx():
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "--compile needs a C++ compiler on a CPU, and there is none; install g++ (Linux) or clang (macOS), name it "
            "in CXX, or leave the flag out."
        ) from None
