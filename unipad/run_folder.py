"""A training run's folder, log and checkpoints."""

import contextlib
import errno
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows: no locks
    fcntl = None

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from unipad.checkpoint import (
    find_checkpoint,
    last_checkpoint,
    read_training,
    remove_unfinished,
    weights_fault,
    write_checkpoint,
)
from unipad.cli import ADDED_FLAGS
from unipad.config import AnyRecipe
from unipad.config_dict import from_dict, to_dict
from unipad.errors import UserError
from unipad.kernels import tuning
from unipad.runtime import World, meet, on_main


def find_run(kind: str, out: Path | None, resume: str, world: World) -> tuple[Path, dict | None]:
    """The folder of this run and the checkpoint that it resumes from, or None. The main process decides for all.

    kind:   runs without `out` are in outputs/<kind>/<time>.
    resume: "never"; "auto": the run in `out` or, without `out`, the newest run of this kind if it is unfinished; or the
            folder of a run.

    The folder is locked until this program ends. Raises `UserError` if another program has locked it, or it contains
    another run.
    """
    # the other processes may see another clock, or another disk
    return on_main(lambda: _find_run(Path("outputs") / kind, out, resume, world.closing), world)


def _find_run(root, out, resume, closing):
    """`find_run` in one process; closing: the ExitStack that unlocks the folder when the program ends."""
    if resume not in ("never", "auto"):
        path = Path(resume)
        if not last_checkpoint(path):
            raise UserError(f"--resume {path} has no checkpoints/last.pt; give the folder of a run.")
        if out and out.resolve() != path.resolve():
            raise UserError(f"--resume {path} continues in {path}, so --out {out} does not apply; leave out --out.")
        closing.enter_context(_locked(path))
        return path, read_training(last_checkpoint(path))
    if out and out.is_file():
        raise UserError(f"--out {out} is a file; give a folder.")
    if resume == "auto":
        newest = max(root.glob("*/checkpoints/last.pt"), default=None, key=lambda file: file.stat().st_mtime)
        path = out or (newest and newest.parent.parent)
        if path:
            lock = closing.enter_context(contextlib.ExitStack())
            lock.enter_context(_locked(path))
            saved = read_training(last_checkpoint(path)) if last_checkpoint(path) else None
            if out or saved["step"] < saved["config"]["steps"]:
                return path, saved
            lock.close()  # the newest run is finished, so this is a new one
    if out:
        closing.enter_context(_locked(out))
        if last_checkpoint(out):
            raise UserError(f"--out {out} has a run already; resume it with --resume auto or choose another folder.")
        return out, None
    root.mkdir(parents=True, exist_ok=True)
    path = _new_folder(root)
    closing.enter_context(_locked(path))
    return path, None


def _new_folder(root):
    """Make root/<time>, with a number appended where runs start in the same second."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        path = root / (f"{stamp}_{number}" if number > 1 else stamp)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def lock_folder(folder: Path, world: World):
    """Make `folder` and lock it until this program ends. Collective.

    Raises `UserError` if another program has locked it.
    """
    on_main(lambda: world.closing.enter_context(_locked(folder)), world)


@contextlib.contextmanager
def _locked(path):
    """Lock a folder against other programs, on any machine that shares it; if empty at the end, it is removed.

    The system releases the lock when this process ends, however it ends. It is a POSIX lock: unlike one of `flock`,
    child processes do not inherit it, so data loading processes that outlive a killed run do not block its resumption.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path / ".lock"
    with file.open("a+") as lock:
        try:
            if fcntl:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # if not of these two kinds, the file system has no locks: continue without one
            if error.errno in (errno.EACCES, errno.EAGAIN):
                lock.seek(0)
                raise UserError(
                    f"{path} is in use by another program ({lock.read(200).strip() or 'which has just started'}): wait "
                    "until it ends, or choose another folder with --out."
                ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        try:
            yield
        finally:
            if [entry.name for entry in path.iterdir()] == [file.name]:
                file.unlink()
                path.rmdir()


class RunFolder:
    """A run's folder: config.json, log.jsonl, tensorboard/, checkpoints/, images/, .lock, eval/ of fine-tuning, and
    tuning.json with --tune.

    Only the main process writes, except for tuning.json: each process tunes its own GPU, and the last write wins.
    """

    def __init__(self, path: Path, config: dict, world: World, saved: dict | None = None):
        """config: as `run_config` makes it.
        saved:  the checkpoint that the run resumes from; log entries of later steps are dropped. Raises `UserError` if
            it was trained with other settings.
        """
        if saved:
            _check_same_settings(saved["config"], config, path)
        self.path, self.config, self.writes = path, config, world.is_main
        self.last_validated_step = saved["validated"] if saved else -1
        if not self.writes:
            return
        for name in ("checkpoints", "images"):
            (path / name).mkdir(parents=True, exist_ok=True)
            remove_unfinished(path / name)
        remove_unfinished(path)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        done = saved["step"] if saved else 0  # steps
        self._board = SummaryWriter(path / "tensorboard", purge_step=done + 1 if done else None)
        _drop_records_after(done, path / "log.jsonl")
        self._log = (path / "log.jsonl").open("a")
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.log({"command": sys.argv, "commit": commit(), "versions": versions, "gpu": gpu, "config": config})
        world.closing.callback(self.close)

    def tune(self):
        """Autotune kernels' launch parameters on this GPU until the run is closed; tuning.json keeps the fastest."""
        file = self.path / "tuning.json"
        try:
            tuning.enable(file)
        except (OSError, ValueError, RecursionError):
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

        parts: name -> object with a `state_dict`; metrics: saved with the step, for `resumed` to return.
        """
        if self.writes:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "metrics": metrics, "validated": self.last_validated_step, "config": self.config}
            folder = self.path / "checkpoints"
            write_checkpoint(state, folder / "last.pt")
            if keep:
                write_checkpoint(state, folder / f"step_{step}.pt")

    @contextlib.contextmanager
    def validation(self, step: int, parts: dict, metrics: dict):
        """Context in which to validate `step`, already saved, and update `metrics`; then saves a checkpoint to keep.

        Step 0 is not saved. A run that is killed inside validates again when it resumes. A run whose validation raises
        an exception does not: the step is saved as validated, and a `UserError` is raised.
        """
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        self.last_validated_step = step
        if step:
            self.save(step, parts, metrics, keep=True)
        if failed:
            saved = f"step {step} is saved, and --resume {self.path} continues after it" if step else "nothing is lost"
            raise UserError(
                f"validation failed: {one_line(failed)}; {saved}; --val-every 0 trains without validation."
            ) from failed
        meet()  # the main process has drawn pictures meanwhile

    def close(self):
        tuning.disable()
        if self.writes:
            self._board.flush()  # unlike `close`, raises what went wrong in TensorBoard's thread
            self._board.close()
            self._log.close()


# Faces are visible from both sides, colors are unlit
VIEW_3D = {"material": {"cls": "MeshBasicMaterial", "side": 2}, "camera": {"cls": "PerspectiveCamera", "fov": 60}}


def resumed(saved: dict | None, parts: dict) -> tuple[int, dict]:
    """Load `parts` from a checkpoint of `RunFolder.save`; returns (step, metrics). A new run starts at (0, {}).

    Raises `UserError` for a part that does not fit.
    """
    if not saved:
        return 0, {}
    for name, part in parts.items():
        try:
            if isinstance(part, torch.optim.Optimizer):
                _load_optimizer(part, saved)
                continue
            if isinstance(part, torch.nn.Module) and (fault := weights_fault(part.state_dict(), saved[name])):
                raise ValueError(fault)
            part.load_state_dict(saved[name])
        except Exception as error:
            raise UserError(
                f"the last checkpoint is damaged, its {name} does not fit this run ({one_line(error)}): copy another "
                "checkpoint of the run over its checkpoints/last.pt, or start a new run."
            ) from None
    return saved["step"], saved["metrics"]


def _load_optimizer(optimizer, saved):
    """Load AdamW's state; its options remain those of this run. Raises ValueError, or what PyTorch raises, for a state
    that training cannot continue from; PyTorch alone would only fail at the next step, or never."""
    groups, saved_groups = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved_groups]:
        raise ValueError("it has other groups of weights")
    optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if not optimizer.state and saved["scaler"]:
        return  # with fp16 (else the scaler's state is {}): all steps so far have overflowed, and it skipped them
    if optimizer.state.keys() != set(weights):
        raise ValueError("it has no state of some weights")
    for weight, state in optimizer.state.items():
        shapes = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        if {name: getattr(value, "shape", None) for name, value in state.items()} != shapes:
            raise ValueError("its state has other shapes than the weights")
        if not 0 < state["step"] <= saved["step"]:
            raise ValueError(f"its state is of step {state['step'].item():.0f}, the checkpoint of step {saved['step']}")
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        if not (mean.isfinite().all() and square.isfinite().all() and (square >= 0).all()):
            raise ValueError("its state has impossible values")


def one_line(error: Exception) -> str:
    """An exception as a part of a sentence."""
    words = " ".join(str(error).split()).rstrip(".")
    return words if isinstance(error, UserError) else f"{type(error).__name__}: {words[:200]}"


def _drop_records_after(step, log):
    """Remove from a log.jsonl the entries of later steps, and invalid lines, such as a half-written last one; print
    the number of invalid lines."""
    if log.is_dir():
        raise UserError(f"{log} is a folder; remove it to resume the run.")
    if log.exists():
        unfinished, invalid = log.with_name(f".{log.name}.{os.getpid()}"), 0
        with unfinished.open("wb") as f:
            for line in filter(None, log.read_bytes().split(b"\n")):
                try:
                    if json.loads(line).get("step", 0) <= step:
                        f.write(line + b"\n")
                except (ValueError, AttributeError, TypeError, RecursionError):
                    invalid += 1
        unfinished.replace(log)
        if invalid:
            print(f"{log}: removed {invalid} damaged lines.", file=sys.stderr)


# Flags that may differ when a run resumes. They do not change the training, except for rounding (device, tune,
# compile). data.features: the folder may have moved, as that of the dataset.
FREE_FLAGS = {
    "config",
    "data_root",
    "data.features",
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
    "compile",
}


def _check_same_settings(old, new, path):
    """Refuse to resume a run under other settings, or on other data."""
    for was, now in (
        ({**ADDED_FLAGS, **old["args"], "steps": old["steps"]}, {**new["args"], "steps": new["steps"]}),
        (dict(_flatten(_with_added_settings(old["recipe"]))), dict(_flatten(new["recipe"]))),
    ):
        if was.keys() != now.keys():
            raise UserError(f"{path} was made by another script or another version of this project; start a new run.")
        for name in now:
            if name not in FREE_FLAGS and was[name] != now[name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"{path} was started with {flag} {was[name]}, not {now[name]}; resume it with only "
                    f"--resume {path}, or start a new run."
                )
    if old.get("data") != new["data"]:
        raise UserError(
            f"{path} was trained on other frames than {new['args']['data_root']} has; give the folder of the run's "
            "dataset as --data-root."
        )


def _with_added_settings(recipe):
    """The dict of a recipe, with the settings that were added since it was written; as it is, if it is from another
    version of the project."""
    try:
        return to_dict(from_dict(AnyRecipe, recipe))
    except TypeError:
        return recipe


def _flatten(settings, prefix=""):
    """Yield (dotted name, value) of nested dicts."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def run_config(args, steps: int, contents: str = "", saved: dict | None = None) -> dict:
    """What config.json holds: a script's flags, its recipe, the steps of the schedule, and which data it trains on.

    contents: `DrivingDataset.contents` of the training set.
    saved:    the checkpoint that the run resumes from.

    --init and --pretrained are recorded as absolute paths of checkpoint files: a folder of runs means its newest, which
    may be another one when the run resumes.
    """
    flags = to_dict(args)
    recipe = flags.pop("recipe")
    for name in SOURCES & flags.keys():
        known = saved["config"]["args"].get(name, []) if saved else []
        flags[name] = [_source(Path(path), known) for path in flags[name]]
    return {"args": flags, "recipe": recipe, "steps": steps, "data": contents}


SOURCES = {"init", "pretrained"}  # flags that name runs or checkpoints


def _source(path, known):
    """The checkpoint file that `path` of --init or --pretrained means: the one of `known` (files that a resumed run has
    recorded) that is `path` or lies inside it; if there is none, that of `find_checkpoint`."""
    inside = [file for file in known if Path(str(file)).is_relative_to(path.resolve())]
    return inside[0] if inside else str(find_checkpoint(path).resolve())


def commit() -> str | None:
    """The commit of this code, with `-dirty` appended where files have changed; None where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() or None
