"""Checkpoints: data, never code. Written whole or not at all; read part by part."""

import os
import pickle
import re
from pathlib import Path

import torch

from unipad.config import AnyRecipe, from_dict
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
    """Load a checkpoint as data, never as code; tensors land on the CPU. Raises `UserError` where that cannot be."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {file}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder without checkpoints/last.pt; name a run or a file.") from None
    except Exception as error:
        raise UserError(_why_unreadable(file, error)) from None


def _why_unreadable(file, error):
    """One sentence about a file that PyTorch does not read as data."""
    code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if code:
        return (
            f"{file} holds code beside its weights ({code[1]}) and was not opened: if you trust it, re-save it once by "
            f"torch.save({{'state_dict': torch.load('{file}', weights_only=False)['state_dict']}}, 'weights.pth') "
            "and take weights.pth."
        )
    with file.open("rb") as f:
        begin = f.read(2)
    if begin == b"PK" or isinstance(error, EOFError):
        return f"{file} is cut off or damaged: copy it once more."
    return f"{file} is not a checkpoint ({type(error).__name__} while reading it)."


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
    saved = read_checkpoint(file)
    try:
        recipe = from_dict(AnyRecipe, saved["config"]["recipe"])
        saved["model"], saved["config"]["args"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} holds no model with a recipe of this version of the project ({error}).") from None
    return saved, recipe, file.parent.parent if file.parent.name == "checkpoints" else file.parent


def take_weights(net, prefix, paths, flag, say):
    """Load the weights of `net` whose names begin with `prefix` out of other runs, and say what was taken.

    paths: as for `find_checkpoint`; a later one's weights go over an earlier one's.
    flag:  the flag that named them, for messages.
    say:   called with one line for each path: how many weights it gave, what was left and why, what stays new.

    Returns the names taken. Raises `UserError` for a file without any of the weights, or with one of another shape.
    """
    mine = {name: w for name, w in net.state_dict().items() if name.startswith(prefix)}
    taken = set()
    for path in paths:
        file = find_checkpoint(path)
        saved = read_checkpoint(file)
        theirs = saved.get("model") if isinstance(saved, dict) else None
        theirs = theirs if isinstance(theirs, dict) else {}
        common = {name: theirs[name] for name in mine.keys() & theirs.keys()}
        other = sorted(name for name, w in common.items() if w.shape != mine[name].shape)
        if not common or other:
            has = _parts(n for n in theirs if n.startswith(prefix))
            what = f"its {other[0]} has another shape" if other else f"of {_parts(mine)} it has {has or 'none'}"
            mend = "" if has else ", or bring weights of another project over by python -m unipad.convert"
            raise UserError(f"{flag} {path} does not fit: {what}; name a run whose preset has the same encoder{mend}.")
        net.load_state_dict(common, strict=False)
        taken |= common.keys()
        left = _parts(theirs.keys() - common.keys())
        left = f"; left {left}, which have no place here" if left else ""
        millions = sum(w.numel() for w in common.values()) / 1e6
        say(f"{flag} {file}: took {millions:.2f} M weights, {_parts(common)}{left}")
    new = mine.keys() - taken
    if paths and new:
        rest = {part_of(name) for name in new} & {part_of(name) for name in taken}
        whole = _parts(name for name in new if part_of(name) not in rest)
        some = ", ".join(sorted(name for name in new if part_of(name) in rest))
        say("new, from scratch: " + ", ".join(filter(None, [whole, some])))
    return taken


def part_of(name):
    """The module that a weight belongs to: two levels of an encoder, one of anything else."""
    return ".".join(name.split(".")[: 3 if name.startswith("encoder.") else 1])


def _parts(names):
    """The modules that the weights `names` belong to, in words."""
    return ", ".join(sorted({part_of(name) for name in names}))
