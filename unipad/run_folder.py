"""What a training run leaves behind: its folder, its log, its checkpoints, and what it prints."""

import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unipad.checkpoint import last_checkpoint, read_checkpoint, write_checkpoint
from unipad.config import to_dict
from unipad.errors import UserError
from unipad.kernels import tuning
from unipad.runtime import World, from_main, mean_over_processes


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
            raise _diverged(step)
        return values

    @contextlib.contextmanager
    def explains_divergence(self, net: torch.nn.Module, step: int):
        """Inside, errors that come from weights that are not finite end the run with the sentence of `finite`.

        After a loss that is not finite nor are the weights, with which a model may raise anything before the next
        report. Weights are read only then: a step that raises nothing does not wait for the device.
        """
        try:
            yield
        except UserError:
            raise
        except Exception:
            if all(p.isfinite().all() for p in net.parameters()):
                raise
            raise _diverged(step) from None

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


def _diverged(step):
    return UserError(f"the loss is not finite at step {step}: lower --lr or use --precision fp32.")


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
