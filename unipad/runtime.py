"""Where a program runs: its device, its processes, its random numbers, and when it stops."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from unipad.errors import UserError
from unipad.exit import Stopped, handle_signals


@dataclass(frozen=True)
class World:
    """The processes of a run: one without torchrun, several under it."""

    rank: int
    size: int
    device: torch.device
    # what must be closed or unlocked however the program ends
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def print0(self, *values):
        """Print in the main process."""
        if self.is_main:
            print(*values, flush=True)

    @contextlib.contextmanager
    def main_first(self):
        """Context whose body the main process runs before the others do; they raise its `UserError` too."""
        if not self.is_main:
            on_main(None, self)  # waits for one of the broadcasts below
        try:
            yield
        except UserError as error:
            if self.is_main and self.size > 1:
                _from_main(error, self)
            raise
        if self.is_main and self.size > 1:
            _from_main(None, self)
        meet()  # others may take long too, e.g. with a cache of their own machine

    def workers(self, asked: int | None) -> int:
        """Data loading processes per process: what was asked for; else 1 on a CPU, and with a GPU 4, or fewer (at least
        1) if that leaves every training process of this machine a core of its own."""
        if asked is not None:
            return asked
        if self.device.type != "cuda":
            return 1
        return max(1, min(4, _usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))

    def micro_batch(self, batch_size: int, accumulate: int) -> int:
        """Samples per micro-batch: a step has `accumulate` micro-batches in every process.

        Raises `UserError` if `batch_size` is not a multiple of their number.
        """
        parts = self.size * accumulate
        if batch_size % parts:
            raise UserError(
                f"--batch-size {batch_size} cannot be split over {self.size} processes x {accumulate} micro-batches; "
                f"use a multiple of {parts}."
            )
        return batch_size // parts

    def sample_slots(self, index: int, micro_batch: int) -> range:
        """Positions of this process's `index`-th micro-batch within the batch of the step over all processes."""
        first = (index * self.size + self.rank) * micro_batch
        return range(first, first + micro_batch)


def _usable_cores():
    """Cores that this process may use: a Slurm job often gets only some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# A collective that takes longer ends the program (Gloo raises, NCCL aborts): a process has failed. Processes await by
# `meet` what may take longer, such as building an index, cutting out objects and the devkit's metrics. A process can be
# minutes late in a step: with --compile, where only the other machine's cache has what it compiles.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
BEAT = 10  # seconds between the signs of life of a process
SILENCE = 600  # seconds without one after which a process is taken for dead
POLL = 0.1  # seconds between looks at the store


class Waits:
    """Waits of processes for each other, of any length, through a key-value store; a process that has died ends them.

    Every process makes the same calls of `meet`, in the same order.

    store: shared by the processes of this start of the program only, so that nothing of an earlier one is found.
    """

    def __init__(self, store: "dist.Store", rank: int, size: int, clock: Callable[[], float] = time.monotonic):
        self.store, self.rank, self.size, self.clock = store, rank, size, clock
        self.number = 0  # of waits so far
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def close(self, failure: str | None):
        """End the signs of life. failure: why this process ends before the others, which then stop waiting, or None."""
        self._stopped.set()
        if failure is not None:
            with contextlib.suppress(RuntimeError):  # the store has gone with its process
                self.store.set("failed", f"process {self.rank} has ended: {failure}")
        self._thread.join(timeout=5)

    def meet(self):
        """Wait until every process has called this."""
        self.number += 1
        others = [rank for rank in range(self.size) if rank != self.rank]
        heard = {rank: (None, self.clock()) for rank in others}  # number of signs of life, when it changed
        next_check = self.clock()
        with self._store_errors():
            arrived = self.store.add(f"arrived {self.number}", 1)
            while arrived < self.size:
                if self.store.check(["failed"]):
                    raise UserError(f"process {self.rank} waited, but {self.store.get('failed').decode()}")
                now = self.clock()
                if now >= next_check:
                    next_check = now + BEAT
                    for rank, (beats, since) in heard.items():
                        latest = self.store.add(f"alive {rank}", 0)
                        if latest != beats:
                            heard[rank] = latest, now
                        elif now - since > SILENCE:
                            raise UserError(
                                f"process {self.rank} waited for process {rank}, which has given no sign of life for "
                                f"{SILENCE} seconds; look for its own message."
                            )
                time.sleep(POLL)
                arrived = self.store.add(f"arrived {self.number}", 0)

    def _live(self):
        with contextlib.suppress(RuntimeError):  # the store is gone: the main thread will notice
            self.store.add(f"alive {self.rank}", 1)
            while not self._stopped.wait(BEAT):
                self.store.add(f"alive {self.rank}", 1)

    @contextlib.contextmanager
    def _store_errors(self):
        try:
            yield
        except RuntimeError:  # PyTorch's errors of networks and stores are some
            raise UserError(
                f"process {self.rank} waited for the others, but the main process (or torchrun on the first machine) "
                "has ended; look for its own message."
            ) from None


_waits = None  # of this program, if it has several processes


def meet():
    """Wait, for any length of time, until all processes have called this; a no-op with one. To be called before a
    collective that one process may reach much later than the others."""
    if _waits is not None:
        _waits.meet()


# Process groups. Gloo's destructor waits for a thread that may wait for the GIL. Python's own reference is dropped
# without holding the GIL, the one in DistributedDataParallel while holding it: so Python's, kept here, must be the last
# to be dropped, or a process may never end.
_GROUPS = []


@contextlib.contextmanager
def start(device: str, deterministic: bool) -> Iterator[World]:
    """Choose the device and join the other processes of torchrun, if there are any.

    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; under torchrun each process takes
        the GPU of its local rank.
    deterministic: use deterministic algorithms only, which makes runs on a GPU bitwise reproducible.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no GPU here; use --device cpu or leave the flag out.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is not a device; use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:N.")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        gpus = torch.cuda.device_count()
        if device.index >= gpus:
            raise UserError(f"{device} does not exist: there are {gpus} GPUs; choose another one or fewer processes.")
        torch.cuda.set_device(device)
        # cuDNN times its algorithms at the first convolution of each shape. Images are padded to one size and volumes
        # have the size of the grid, so steps repeat a few shapes. Where images vary in size, each size is timed once.
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if size > 1:
        gpu = device if device.type == "cuda" else None
        from torch.distributed.rendezvous import rendezvous  # absent in builds without torch.distributed

        store, _, _ = next(rendezvous("env://", rank, size, timeout=COLLECTIVE_TIMEOUT))
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=size,
            timeout=COLLECTIVE_TIMEOUT, device_id=gpu,
        )  # fmt: skip
        _GROUPS.append(dist.group.WORLD)
    world = World(rank, size, device)
    try:
        with _waiting(store, world) if size > 1 else contextlib.nullcontext(), world.closing:
            yield world
    finally:
        if size > 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def _waiting(store, world):
    """Context in which `meet` works. store: as torchrun keeps it, maybe over restarts of the program."""
    global _waits
    # the main process's random name for this start: torchrun does not count a restart for a changed number of nodes
    name = _broadcast(uuid.uuid4().hex, world)
    _waits, failure = Waits(dist.PrefixStore(name, store), world.rank, world.size), None
    try:
        yield
        with contextlib.suppress(UserError):  # the process that holds the store may be the first to leave
            meet()
    except BaseException as error:  # a signal too
        failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}".splitlines()[0]
        raise
    finally:
        _waits.close(failure)
        _waits = None


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def mixed_precision(precision: str | None, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """(autocast, gradient scaler) for a name in `PRECISIONS`; None: bf16 on GPUs (fp16 if they lack it), fp32 on CPUs.

    Raises `UserError` for bf16 on a GPU without it, where compilers emulate it slowly or fail.
    """
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--precision bf16: {name} does not support bf16; use fp16, or leave the flag out.")
    default = "fp32" if device.type != "cuda" else "bf16" if has_bf16(device) else "fp16"
    dtype = PRECISIONS[precision or default]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def has_bf16(device: torch.device) -> bool:
    """False only for NVIDIA GPUs before Ampere. On ROCm, capabilities start at 9 and every supported GPU has bf16."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def generators(seed: int, step: int, positions: Iterable[int], device) -> list[torch.Generator]:
    """One random generator per sample, a function of (seed, step, position in the global batch) alone.

    All randomness of a training step comes from here. So a step draws the same numbers whether or not the run was
    resumed, and however its samples are spread over processes.
    """
    states = [np.random.SeedSequence([seed, step, p]).generate_state(1, np.uint64)[0] for p in positions]
    return [torch.Generator(device).manual_seed(int(state)) for state in states]


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; a no-op with one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def on_main(make: Callable | None, world: World):
    """Call `make` in the main process; every process returns its result, sent pickled, or raises its `UserError`.

    make: only the main process needs it, others may pass None; may take any time. Collective: all processes must call
        `on_main`.
    """
    if world.size == 1:
        return make()
    value = None
    if world.is_main:
        try:
            value = make()
        except UserError as error:
            value = error
    value = _from_main(value, world)
    if isinstance(value, UserError):
        raise value
    return value


def _from_main(value, world):
    """The main process's `value` in every process. Processes may take any time to get here. Collective."""
    meet()
    return _broadcast(value, world)


def _broadcast(value, world):
    """The main process's `value` in every process. Collective."""
    values = [value]
    dist.broadcast_object_list(values, device=world.device)
    return values[0]


def gather_to_main(value, world: World) -> list | None:
    """The list of all processes' `value`s in the main process, None elsewhere. Processes may take any time to get here.
    Collective."""
    values = [None] * world.size if world.is_main else None
    if world.size == 1:
        return [value]
    meet()
    dist.gather_object(value, values)
    return values


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalar tensors by name to floats, the mean over all processes. Waits for the device. Collective."""
    total = all_reduce_sum(torch.stack([v.detach().double() for v in values.values()]))
    size = dist.get_world_size() if dist.is_initialized() else 1
    return dict(zip(values, (total / size).tolist(), strict=True))


def local_gradients(model, more: bool):
    """Context in which `model`'s gradients stay in this process, if `more` micro-batches of the step follow.

    The backward pass of the step's last micro-batch averages the gradients over processes.
    """
    return model.no_sync() if more and hasattr(model, "no_sync") else contextlib.nullcontext()


class StopOnSignal:
    """After a signal (`exit.SIGNALS`, or a closed pipe), lets the step end and be saved before the program ends."""

    def __init__(self, world: World):
        self.world = world
        self.number = 0  # of the first signal, 0 before
        self.deferred = True  # a signal does not end the program at once, but is asked for with `asked`
        handle_signals(self._on_signal)

    def _on_signal(self, number, _):
        """Only the first signal counts: Slurm and torchrun send several, and users press Ctrl-C twice."""
        self.number = self.number or int(number)
        self._end_unless_deferred()

    def _end_unless_deferred(self):
        if self.number and not self.deferred:
            self.deferred = True  # nothing interrupts the cleanup
            raise Stopped(self.number)

    @contextlib.contextmanager
    def at_once(self):
        """Context with nothing to save: a signal ends the program at once.

        With several processes the signal waits for `asked`, as it does outside, so that all stop together.
        """
        self.deferred = self.world.size > 1
        self._end_unless_deferred()
        try:
            yield
        finally:
            self.deferred = True

    def asked(self, host_waits: bool) -> bool:
        """True in all processes once one of them was signaled. Collective.

        host_waits: whether the host waits for the GPU in this step anyway; only then do several GPU processes tell each
            other of signals, otherwise they return False. Of no effect with one process, or on CPUs.
        """
        if self.world.size > 1 and (host_waits or self.world.device.type == "cpu"):
            number = torch.tensor(self.number, device=self.world.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
            return self.number > 0
        return self.world.size == 1 and self.number > 0

    def end(self, sentence: str):
        """End the program with the exit code of the signal, and with `sentence` on stderr."""
        raise Stopped(self.number, sentence)
