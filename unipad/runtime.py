"""Where a run happens and what it leaves behind: device, processes, random numbers, progress, run folder."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unipad.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
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
        sys.exit(_refuse("the GPU is out of memory: lower --batch-size, or use --precision bf16."))


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
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def print0(self, *values):
        """Print in the main process."""
        if self.is_main:
            print(*values, flush=True)

    @contextlib.contextmanager
    def main_first(self):
        """The main process runs the block before the others do."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()

    def workers(self, asked: int | None) -> int:
        """Data loading processes per process: what was asked for, or 4 with a GPU and 1 without."""
        return asked if asked is not None else 4 if self.device.type == "cuda" else 1

    def micro_batch(self, batch_size: int, accumulate: int) -> int:
        """Samples of a micro-batch: a step is `accumulate` of them in every process. Raises `UserError`."""
        parts = self.size * accumulate
        if batch_size % parts:
            raise UserError(
                f"--batch-size {batch_size} cannot be split over {self.size} processes x {accumulate} micro-batches; "
                f"use a multiple of {parts}."
            )
        return batch_size // parts

    def positions(self, index: int, micro_batch: int) -> range:
        """Positions in the step's batch of this process's micro-batch number `index`."""
        first = (index * self.size + self.rank) * micro_batch
        return range(first, first + micro_batch)


# Gloo's destructor waits for a thread that may wait for the GIL. Python's own reference is dropped without the GIL, the
# one in DistributedDataParallel with it: so Python's has to be the last, or a process may never end.
_GROUPS = []


@contextlib.contextmanager
def start(device: str, deterministic: bool) -> Iterator[World]:
    """Choose the device and join the other processes of torchrun, if there are any.

    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; under torchrun each process takes
        the GPU of its local rank.
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
            raise UserError(f"{device} does not exist, there are {gpus} GPUs; choose another one or fewer processes.")
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if size > 1:
        gpu = device if device.type == "cuda" else None
        # The others may wait for hours for the main one: an index, objects to paste, the devkit's metrics.
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=12))
        _GROUPS.append(dist.group.WORLD)
    try:
        yield World(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def mixed_precision(precision: str | None, device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """(autocast, gradient scaler) for a name in `PRECISIONS`; None: on a GPU bf16, or fp16 if it lacks bf16; else fp32.

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
    """False for NVIDIA GPUs before Ampere. On ROCm, capabilities start at 9 and every supported GPU has bf16."""
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


def from_main(value, world: World):
    """The main process's `value` in every process, sent pickled. Collective: all processes must call it."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, device=world.device)
    return values[0]


def to_main(value, world: World) -> list | None:
    """The list of all processes' `value`s in the main process, None elsewhere. Collective."""
    values = [None] * world.size if world.is_main else None
    if world.size == 1:
        return [value]
    dist.gather_object(value, values)
    return values


def mean_over_processes(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalar tensors by name to floats, the mean over all processes. Waits for the device. Collective."""
    total = all_reduce_sum(torch.stack([v.detach().double() for v in values.values()]))
    size = dist.get_world_size() if dist.is_initialized() else 1
    return dict(zip(values, (total / size).tolist(), strict=True))


def local_gradients(model, more: bool):
    """Context in which `model`'s gradients stay in this process, if `more` micro-batches of the step follow.

    The backward pass of the last one averages over processes.
    """
    return model.no_sync() if more and hasattr(model, "no_sync") else contextlib.nullcontext()


class Progress:
    """What a training loop reports: losses and speed, to the run and the terminal; unreadable frames, each once."""

    def __init__(self, run, world: World, step: int, last: int, steps: int, batch_size: int):
        """step: done so far; last: where this process stops, of the `steps` that the schedule spans."""
        self.run, self.world, self.last, self.steps, self.batch_size = run, world, last, steps, batch_size
        self.unreadable = set()
        self.restart(step)

    def restart(self, step: int):
        """Measure speed from this step and moment on."""
        self.since, self.clock = step, time.perf_counter()

    def skip(self, bad_frames: list[str]):
        """Name frames that could not be read."""
        for frame in set(bad_frames) - self.unreadable:
            print(f"skipped {frame}", file=sys.stderr)
        self.unreadable.update(bad_frames)

    def sum_up(self):
        """Say how many frames could not be read."""
        if self.unreadable:
            self.world.print0(f"{len(self.unreadable)} unreadable frames, named above, were replaced by others.")

    def finite(self, values: dict[str, torch.Tensor], scaler, step: int) -> dict[str, float]:
        """`mean_over_processes`; raises `UserError` where training has diverged, before that would be saved."""
        values = mean_over_processes(values)
        # fp16 skips a step whose gradient overflows, and lowers its scale
        if not math.isfinite(values["loss"] + (0 if scaler.is_enabled() else values["grad_norm"])):
            raise UserError(f"the loss is not finite at step {step}: lower --lr or use --precision fp32.")
        return values

    def report(self, step: int, values: dict[str, float], lr: float, rays_per_sample: int = 0):
        """Log the values of `step` and print them, with the speed since the last report."""
        speed = self.batch_size * (step - self.since) / (time.perf_counter() - self.clock)
        self.restart(step)
        rates = {"lr": lr, "samples_per_s": speed, **memory_mb(self.world.device)}
        rates |= {"rays_per_s": speed * rays_per_sample} if rays_per_sample else {}
        self.run.scalars({f"train/{name}": value for name, value in (values | rates).items()}, step)
        left = timedelta(seconds=round((self.last - step) * self.batch_size / speed))
        line = f"step {step}/{self.steps}  {format_metrics(values)}  {format_metrics(rates)}  {left} left"
        self.world.print0(line)


class StopOnSignal:
    """Ctrl-C and SIGTERM let the current step finish, so that it can be saved; a second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, world: World) -> bool:
        """True in all processes once one of them was signaled. Collective."""
        if world.size == 1:
            return self.signal > 0
        return all_reduce_sum(torch.tensor(float(self.signal), device=world.device)).item() > 0


def find_run(kind: str, out: Path | None, resume: str, world: World) -> tuple[Path, dict | None]:
    """The folder of this run and the checkpoint that it resumes from, or None. The main process decides for all.

    kind:   runs without `out` are in outputs/<kind>/<time>.
    resume: "never"; "auto", what is in `out`, or the newest run of this kind if it is unfinished; or a run's folder.
    """
    found = _find_run(Path("outputs") / kind, out, resume) if world.is_main else None
    return from_main(found, world)  # the others may see another clock, or another disk


def _find_run(root, out, resume):
    if resume == "never":
        if out and last_checkpoint(out):
            raise UserError(f"--out {out} has a run already; resume it with --resume auto or choose another folder.")
        return out or _new_run_path(root), None
    if resume != "auto":
        path = Path(resume)
        if not last_checkpoint(path):
            raise UserError(f"--resume {path} has no checkpoints/last.pt; give the folder of a run.")
        if out and out.resolve() != path.resolve():
            raise UserError(f"--out {out} is not the run that --resume {path} names, which stays there; leave it out.")
        return path, read_checkpoint(last_checkpoint(path))
    newest = max(root.glob("*/checkpoints/last.pt"), default=None, key=lambda file: file.stat().st_mtime)
    path = out or (newest.parent.parent if newest else _new_run_path(root))
    saved = read_checkpoint(last_checkpoint(path)) if last_checkpoint(path) else None
    if saved and not out and saved["step"] >= saved["config"]["steps"]:
        return _new_run_path(root), None
    return path, saved


class RunFolder:
    """A run's folder: config.json, log.jsonl, tensorboard/, checkpoints/, images/. Only the main process writes.

    Except for tuning.json with --tune: each process tunes its own GPU, and the last one to write the file wins.
    """

    def __init__(self, path: Path, config: dict, world: World, saved: dict | None = None):
        """config: as `run_config` makes it.
        saved:  the checkpoint that the run resumes from; what was logged after it is dropped. Raises `UserError` if it
            was trained under other settings.
        """
        if saved:
            _check_same_settings(saved["config"], config, path)
        self.path, self.config, self.writes = path, config, world.is_main
        if not self.writes:
            return
        if path.is_file():
            raise UserError(f"--out {path} is a file; give a folder.")
        for name in ("checkpoints", "images"):
            (path / name).mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        first = saved["step"] if saved else 0
        self._board = SummaryWriter(path / "tensorboard", purge_step=first + 1 if first else None)
        _drop_records_after(first, path / "log.jsonl")
        self._log = (path / "log.jsonl").open("a")
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.log({"command": sys.argv, "commit": commit(), "versions": versions, "gpu": gpu, "config": config})

    def tune(self):
        """Autotune kernel launches on this GPU until the run is closed; the fastest are kept in tuning.json."""
        file = self.path / "tuning.json"
        try:
            tuning.enable(file)
        except ValueError:
            raise UserError(f"{file} is damaged; remove it to tune again.") from None

    def log(self, record: dict):
        """Append one JSON line."""
        if self.writes:
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()

    def scalars(self, values: dict[str, float], step: int):
        """Write scalars by name to TensorBoard and to log.jsonl."""
        if self.writes:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self.log({"step": step, **values})

    def picture(self, name: str, image: np.ndarray, step: int):
        """Write `image` ([H, W, 3] uint8) to TensorBoard and to images/<name>_<step>.png."""
        if self.writes:
            Image.fromarray(image).save(self.path / "images" / f"{name}_{step:06d}.png")
            self._board.add_image(name, image, step, dataformats="HWC")

    def scene(self, name: str, mesh, step: int):
        """Write a `draw.scene3d.Mesh` to TensorBoard."""
        if self.writes:
            vertices, colors, faces = (torch.from_numpy(a)[None] for a in (mesh.vertices, mesh.colors, mesh.faces))
            self._board.add_mesh(name, vertices, colors, faces, VIEW_3D, step)

    def save(self, step: int, parts: dict, metrics: dict, keep: bool = False):
        """Write checkpoints/last.pt atomically; `keep` also keeps it as step_<N>.pt.

        parts: name -> what has a `state_dict`; metrics: what `resumed` should return with the step.
        """
        if self.writes:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "metrics": metrics, "config": self.config}
            folder = self.path / "checkpoints"
            write_checkpoint(state, folder / "last.pt")
            if keep:
                write_checkpoint(state, folder / f"step_{step}.pt")

    def close(self):
        tuning.disable()
        if self.writes:
            self._board.close()
            self._log.close()


# Visible from both sides, colors without lights
VIEW_3D = {"material": {"cls": "MeshBasicMaterial", "side": 2}, "camera": {"cls": "PerspectiveCamera", "fov": 60}}


def resumed(saved: dict | None, parts: dict) -> tuple[int, dict]:
    """Load `parts` from a checkpoint of `RunFolder.save`; returns (step, metrics). A new run starts at (0, {})."""
    if not saved:
        return 0, {}
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"], saved["metrics"]


def _drop_records_after(step, log):
    """Remove the records of later steps, and a half-written last line, from a log.jsonl."""
    if log.exists():
        part = log.with_name(f".{log.name}.{os.getpid()}")
        with part.open("w") as f:
            for line in log.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= step:
                        f.write(line + "\n")
        part.replace(log)


def _new_run_path(root):
    """root/<time>, with a number appended where two runs start in the same second."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = [stamp] + [f"{stamp}_{i}" for i in range(2, 100)]
    return next(root / name for name in names if not (root / name).exists())


# Flags that may differ when a run resumes: they change where it runs and what it shows, not what it computes.
FREE_FLAGS = {
    "config",
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


def _check_same_settings(old, new, path):
    """Refuse to resume a run under other settings."""
    for was, now in (
        ({**old["args"], "steps": old["steps"]}, {**new["args"], "steps": new["steps"]}),
        (dict(_flatten(old["recipe"])), dict(_flatten(new["recipe"]))),
    ):
        if was.keys() != now.keys():
            raise UserError(f"{path} was made by another version of this project; start a new run.")
        for name in now:
            if name not in FREE_FLAGS and was[name] != now[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{path} was started with {flag} {was[name]}, not {now[name]}; resume it with only "
                    f"--resume {path}, or start a new run."
                )


def _flatten(settings, prefix=""):
    """Yield (dotted name, value) of nested dicts."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def run_config(args, steps: int) -> dict:
    """What config.json holds: a script's flags, their recipe, and the steps of the schedule."""
    flags = to_dict(args)
    return {"args": flags, "recipe": flags.pop("recipe"), "steps": steps}


def to_dict(config) -> dict:
    """A dataclass as JSON-able values, which `weights_only` reads too; `config.from_dict` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def commit() -> str | None:
    """The commit of this code, with `-dirty` appended where files have changed; None where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def format_metrics(values: dict[str, float]) -> str:
    """Numbers with their names, three digits each, for a progress line."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory so far, of the GPU or of this process."""
    if device.type == "cuda":
        return {"gpu_mem_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    return {"mem_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}
