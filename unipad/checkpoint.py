"""Checkpoints: data, never code. Written whole or not at all; read part by part."""

import os
from pathlib import Path

import torch

from unipad.config import DetectRecipe, PretrainRecipe, from_plain
from unipad.errors import UserError


def write_checkpoint(state, file: Path):
    """Save under a temporary name and rename, so that a crash leaves the previous file intact."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with part.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(file)


def read_checkpoint(file: Path):
    """Load a checkpoint as data, never as code; tensors land on the CPU."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {file}.") from None
    except Exception as error:
        reason = type(error).__name__
        raise UserError(f"{file} is not a checkpoint of this project ({reason} while reading it).") from None


def last_checkpoint(run: Path):
    """The newest state of a run folder, or None."""
    file = run / "checkpoints" / "last.pt"
    return file if file.exists() else None


def find_checkpoint(path: Path):
    """The checkpoint that a user means by a checkpoint, a run folder, or a folder of runs (its newest)."""
    newest = max(path.glob("*/checkpoints/last.pt"), default=None, key=lambda file: file.stat().st_mtime)
    return last_checkpoint(path) or newest or path


def read_run(path: Path):
    """What is known of a run: (its last state, its recipe, its folder).

    path: as for `find_checkpoint`; of a checkpoint that is in no run, the folder is the one it is in.
    Raises `UserError` where there is none.
    """
    file = find_checkpoint(path)
    if file.is_dir():
        raise UserError(f"{path} has no checkpoints/last.pt; name the folder of a run, or a checkpoint.")
    saved = read_checkpoint(file)
    try:
        plain = saved["config"]["recipe"]
        recipe = from_plain(DetectRecipe if "detect" in plain else PretrainRecipe, plain)
        saved["model"], saved["config"]["args"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} holds no model with a recipe of this version of the project ({error}).") from None
    return saved, recipe, file.parent.parent if file.parent.name == "checkpoints" else file.parent


def take_weights(net, prefix, paths, flag, say):
    """Load the weights of `net` whose names begin with `prefix` out of other runs, and say what was taken.

    paths: as for `find_checkpoint`; a later one's weights go over an earlier one's.
    flag:  the flag that named them, for messages.
    say:   called with one line for each path: how many weights it gave, which of its parts were left, what stays new.

    Returns the names taken. Raises `UserError` for a file without any of the weights, or with one of another shape.
    """
    mine = {name: w for name, w in net.state_dict().items() if name.startswith(prefix)}
    taken = set()
    for path in paths:
        theirs = read_checkpoint(find_checkpoint(path)).get("model", {})
        common = {name: theirs[name] for name in mine.keys() & theirs.keys()}
        other = sorted(name for name, w in common.items() if w.shape != mine[name].shape)
        if not common or other:
            has = _parts(n for n in theirs if n.startswith(prefix)) or "none"
            what = f"its {other[0]} has another shape" if other else f"of {_parts(mine)} it has {has}"
            raise UserError(f"{flag} {path} does not fit: {what}; name a run of the same modality and preset.")
        net.load_state_dict(common, strict=False)
        taken |= common.keys()
        left = _parts(theirs.keys() - common.keys())
        millions = sum(w.numel() for w in common.values()) / 1e6
        say(f"{flag} {path}: took {millions:.2f} M weights, {_parts(common)}" + (f"; left {left}" if left else ""))
    new = _parts(mine.keys() - taken)
    if paths and new:
        say(f"new, from scratch: {new}")
    return taken


def _parts(names):
    """The modules that the weights `names` belong to, in words: two levels of an encoder, one of anything else."""
    parts = {".".join(name.split(".")[: 3 if name.startswith("encoder.") else 1]) for name in names}
    return ", ".join(sorted(parts))
