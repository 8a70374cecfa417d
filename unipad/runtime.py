"""Where a run happens and what it leaves behind: device, processes, random numbers, run folder."""

import contextlib
import dataclasses
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unipad.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from unipad.config import from_plain
from unipad.errors import UserError
from unipad.kernels import tuning


@contextlib.contextmanager
def exit_on_user_error():
    """Print a `UserError` as one line and exit with code 2; running out of GPU memory is one too."""
    try:
        yield
    except UserError as error:
        sys.exit(_refuse(str(error)))
    except torch.OutOfMemoryError:
        sys.exit(_refuse("the GPU is out of memory: lower --batch-size, or take --precision bf16."))


def _refuse(sentence):
    print(f"error: {sentence}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class World:
    """The processes of a run: one without torchrun, several under it."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """True in the one process that writes files and prints."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self):
        """The main process runs the block before the others do."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


# Gloo's destructor waits for a thread that may wait for Python's lock. Python's own reference is given up without the
# lock, the one in DistributedDataParallel with it: so Python's has to be the last, or a process may never end.
_GROUPS = []


@contextlib.contextmanager
def start(device: str, deterministic: bool) -> Iterator[World]:
    """Choose the device and join the other processes of torchrun, if there are any.

    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; under torchrun each process takes
        the GPU of its local rank.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch sees no GPU here; use --device cpu or leave the flag out.")
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
            raise UserError(f"{device} is wanted, but there are only {gpus} GPUs; choose another or fewer processes.")
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if size > 1:
        gpu = device if device.type == "cuda" else None
        # The first may take hours over what the others wait for: an index, objects to paste, the devkit's metrics.
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=12))
        _GROUPS.append(dist.group.WORLD)
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def mixed_precision(precision, device):
    """(autocast, gradient scaler) of a name in `PRECISIONS`; None: on a GPU bf16, or fp16 if it lacks bf16; else fp32.

    Raises `UserError` for bf16 on a GPU without it, where compilers emulate it slowly or fail.
    """
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--precision bf16: {name} does not support bf16; use fp16, or leave the flag out.")
    default = "fp32" if device.type != "cuda" else "bf16" if has_bf16(device) else "fp16"
    dtype = PRECISIONS[precision or default]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def has_bf16(device):
    """False for NVIDIA GPUs before Ampere. On ROCm, capabilities start at 9 and every supported GPU has bf16."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def generators(seed, step, positions, device):
    """One random generator a sample, a function of (seed, step, position in the global batch) alone.

    All randomness of a training step comes from here. So a step draws the same numbers after a resume as
    without one, and however its samples are spread over processes.
    """
    states = [np.random.SeedSequence([seed, step, p]).generate_state(1, np.uint64)[0] for p in positions]
    return [torch.Generator(device).manual_seed(int(state)) for state in states]


def all_reduce_sum(tensor):
    """The sum over all processes, in place; the tensor itself where there is one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(value, world):
    """The main process's `value`, in every process; it travels pickled. All processes must ask."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, device=world.device)
    return values[0]


def to_main(value, world):
    """The list of every process's `value` in the main process, None elsewhere. All processes must ask."""
    values = [None] * world.size if world.is_main else None
    if world.size == 1:
        return [value]
    dist.gather_object(value, values)
    return values


def mean_over_processes(values):
    """dict name -> scalar tensor to dict name -> float, the mean over all processes. Waits for the device."""
    total = all_reduce_sum(torch.stack([v.detach().double() for v in values.values()]))
    size = dist.get_world_size() if dist.is_initialized() else 1
    return dict(zip(values, (total / size).tolist(), strict=True))


class StopOnSignal:
    """Ctrl-C and SIGTERM let the step in hand end, so that it can be saved; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, world):
        """True in all processes as soon as one was signalled. Every process must ask at the same steps."""
        if world.size == 1:
            return self.signal > 0
        return all_reduce_sum(torch.tensor(float(self.signal), device=world.device)).item() > 0


class RunFolder:
    """A run's folder: config.json, log.jsonl, tensorboard/, checkpoints/, images/. Only the main process writes.

    All but tuning.json, which is there on request: processes have GPUs of their own, and the last to write it wins.
    """

    def __init__(self, path: Path, config, world: World, first=0):
        """`first`: the step that the run goes on from; what a crashed run logged after it is dropped."""
        self.path, self.writes = path, world.is_main
        if not self.writes:
            return
        if path.is_file():
            raise UserError(f"--out {path} is a file; name a folder.")
        for name in ("checkpoints", "images"):
            (path / name).mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self._board = SummaryWriter(path / "tensorboard", purge_step=first + 1 if first else None)
        _drop_records_after(first, path / "log.jsonl")
        self._log = (path / "log.jsonl").open("a")
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.log({"command": sys.argv, "commit": commit(), "versions": versions, "gpu": gpu, "config": config})

    @classmethod
    def new_or_resumed(cls, name, out, resume, config, world, kinds):
        """The folder of this run and the checkpoint it goes on from, or None. The main process decides for all.

        name:   of the kind of run; runs without `out` live in outputs/<name>/<time>.
        resume: "never"; "auto", the newest checkpoint of `out` or of the newest run, if it is unfinished;
            or the run folder to go on with.
        config: {"args": ..., "recipe": ..., "steps": ...}; must agree with the checkpoint's where it
            decides the curve.
        kinds:  the dataclasses of args and recipe: what they have learned since the run began had its default then.
        """
        decided = cls._decide(name, out, resume, config, kinds) if world.is_main else None
        path, saved = from_main(decided, world)  # the others may see another clock, or another disk
        return cls(path, config, world, saved["step"] if saved else 0), saved

    @staticmethod
    def _decide(name, out, resume, config, kinds):
        root = Path("outputs") / name
        path = out or _new_run_path(root)
        if resume == "never":
            if out and last_checkpoint(out):
                raise UserError(f"--out {out} holds a run already; add --resume auto or choose another folder.")
        elif resume == "auto":
            newest = max(root.glob("*/checkpoints/last.pt"), default=None, key=lambda f: f.stat().st_mtime)
            path = out or (newest.parent.parent if newest else path)
        else:
            path = Path(resume)
            if not last_checkpoint(path):
                raise UserError(f"--resume {path} has no checkpoints/last.pt; name the folder of a run.")
        file = last_checkpoint(path) if resume != "never" else None
        saved = read_checkpoint(file) if file else None
        if saved and resume == "auto" and not out and saved["step"] >= saved["config"]["steps"]:
            path, saved = _new_run_path(root), None
        if saved:
            _check_same_curve(_completed(saved["config"], kinds), config, path)
        return path, saved

    def tune(self):
        """Try ways to launch kernels on this GPU until the run is closed; keep what was fastest in tuning.json."""
        file = self.path / "tuning.json"
        try:
            tuning.enable(file)
        except ValueError:
            raise UserError(f"{file} is damaged; remove it, and the launches are tried again.") from None

    def log(self, record):
        """Append one JSON line."""
        if self.writes:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    def scalars(self, values, step):
        """Write `values` (name -> float) to TensorBoard and to log.jsonl."""
        if self.writes:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self.log({"step": step, **values})

    def picture(self, name, image, step):
        """Write `image` ([H, W, 3] uint8) to TensorBoard and to images/<name>_<step>.png."""
        if self.writes:
            Image.fromarray(image).save(self.path / "images" / f"{name}_{step:06d}.png")
            self._board.add_image(name, image, step, dataformats="HWC")

    def save(self, state, keep=False):
        """Write checkpoints/last.pt, whole or not at all; `keep` leaves a step_<N>.pt beside it."""
        if self.writes:
            folder = self.path / "checkpoints"
            write_checkpoint(state, folder / "last.pt")
            if keep:
                write_checkpoint(state, folder / f"step_{state['step']}.pt")

    def close(self):
        tuning.disable()
        if self.writes:
            self._board.close()
            self._log.close()


def _drop_records_after(step, log):
    """Cut records of later steps, and a half-written last line, off a log.jsonl."""
    if log.exists():
        part = log.with_name(f".{log.name}.{os.getpid()}")
        with part.open("w") as f:
            for line in log.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= step:
                        f.write(line + "\n")
        part.replace(log)


def _new_run_path(root):
    """root/<time>, with a number behind where two runs start in one second."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = [stamp] + [f"{stamp}_{i}" for i in range(2, 100)]
    return next(root / name for name in names if not (root / name).exists())


# Flags that may differ when a run goes on: they change where it runs and what it shows, not what it should compute.
FREE_FLAGS = {
    "out",
    "resume",
    "stop_at",
    "workers",
    "device",
    "log_every",
    "val_every",
    "val_samples",
    "picture_stride",
    "save_every",
    "checkpointing",
    "tune",
}


def _completed(saved, kinds):
    """The config of an older run with the settings that its `kinds` have gained since, at their defaults."""
    args, recipe = kinds
    with contextlib.suppress(TypeError):  # a setting that is gone: the difference will be named
        saved = {**saved, "recipe": to_dict(from_plain(recipe, saved["recipe"]))}
    return {**saved, "args": {**to_dict(args()), **saved["args"]}}


def _check_same_curve(saved, config, path):
    """Refuse to go on with a run under other settings."""
    old = {**saved["args"], "recipe": saved["recipe"], "steps": saved["steps"]}
    new = {**config["args"], "recipe": config["recipe"], "steps": config["steps"]}
    for name in new.keys() - FREE_FLAGS:
        if old.get(name) != new[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{path} was started with another {flag} ({_difference(old.get(name), new[name])}); "
                f"repeat the flags of its config.json or start afresh with --resume never."
            )


def _difference(old, new):
    if isinstance(old, dict) and isinstance(new, dict):
        return "; ".join(f"{k}: {_difference(old.get(k), new[k])}" for k in new if old.get(k) != new[k])
    return f"{old} there, {new} now"


def to_dict(config):
    """A dataclass as JSON-able values (and so as `weights_only` ones)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def commit():
    """The commit of this code, `-dirty` behind it where files have changed; None where git does not tell."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def format_metrics(values):
    """A progress line's part: dict name -> number, three digits each."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def memory_mb(device):
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return {"gpu_mem_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    return {"mem_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
