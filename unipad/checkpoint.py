"""Checkpoints: written atomically, read as data and never as code, loaded whole or in part (such as an encoder)."""

import os
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from unipad.config import AnyRecipe, Recipe, from_dict
from unipad.errors import UserError


def write_checkpoint(state: dict, file: Path):
    """Save under a temporary name and rename, so that a crash leaves the previous file intact."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    with part.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    part.replace(file)


def read_checkpoint(file: Path) -> dict:
    """Load a checkpoint as data, never as code, onto the CPU. Raises `UserError` where that is not possible."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {file}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder without checkpoints/last.pt; give a run or a file.") from None
    except Exception as error:
        raise UserError(_why_unreadable(file, error)) from None


def _why_unreadable(file, error):
    """Why PyTorch does not read a file as data, in one sentence."""
    code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if code:
        return (
            f"{file} contains code besides weights ({code[1]}) and was not opened: if you trust it, re-save it with "
            f"torch.save({{'state_dict': torch.load('{file}', weights_only=False)['state_dict']}}, 'weights.pth') "
            "and use weights.pth."
        )
    with file.open("rb") as f:
        begin = f.read(2)
    if begin == b"PK" or isinstance(error, EOFError):
        return f"{file} is truncated or damaged: copy it again."
    return f"{file} is not a checkpoint ({type(error).__name__} while reading it)."


def last_checkpoint(run: Path) -> Path | None:
    """The newest state of a run folder, or None."""
    file = run / "checkpoints" / "last.pt"
    return file if file.exists() else None


def find_checkpoint(path: Path) -> Path:
    """The file meant by a checkpoint, a run folder, or a folder of runs (the newest of them)."""
    newest = max(path.glob("*/checkpoints/last.pt"), default=None, key=lambda file: file.stat().st_mtime)
    return last_checkpoint(path) or newest or path


def read_run(path: Path) -> tuple[dict, Recipe, Path]:
    """(last checkpoint, recipe, folder) of a run.

    path: as for `find_checkpoint`; the folder of a checkpoint outside a run is the one that contains it.
    Raises `UserError` where there is none.
    """
    file = find_checkpoint(path)
    saved = read_checkpoint(file)
    try:
        recipe = from_dict(AnyRecipe, saved["config"]["recipe"])
        saved["model"], saved["config"]["args"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{file} has no model with a recipe of this version of the project: {error}.") from None
    return saved, recipe, file.parent.parent if file.parent.name == "checkpoints" else file.parent


def take_weights(net: nn.Module, prefix: str, paths: Sequence[Path], flag: str, print0: Callable) -> set[str]:
    """Load the weights of `net` whose names begin with `prefix` from other runs, and report what was taken.

    paths:  as for `find_checkpoint`; where several have a weight, the last one wins.
    flag:   the flag that named them, for messages.
    print0: called with a line per path: how many weights were taken and what was ignored; then with what keeps its
            random initialization.

    Returns the names taken. Raises `UserError` for a file that has none of the weights, or one of another shape, and
    where none of the files has the camera's frozen stages.
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
            fix = "" if has else ", or convert weights of another project with python -m unipad.convert"
            raise UserError(f"{flag} {path} does not fit: {what}; give a run whose preset has the same encoder{fix}.")
        net.load_state_dict(common, strict=False)
        taken |= common.keys()
        left = _parts(theirs.keys() - common.keys())
        left = f"; ignored {left}, not part of this model" if left else ""
        millions = sum(w.numel() for w in common.values()) / 1e6
        print0(f"{flag} {file}: took {millions:.2f} M weights, {_parts(common)}{left}")
    new = mine.keys() - taken
    frozen = [name for name, p in net.named_parameters() if name in new and not p.requires_grad]
    frozen = [name for name in frozen if name.startswith("encoder.camera.")]
    if paths and frozen:
        raise UserError(
            f"{flag} {' '.join(map(str, paths))} has no weights of {part_of(frozen[0])}, whose first stages this "
            "recipe does not train; name a run or checkpoint that has them too."
        )
    if paths and new:
        mixed = {part_of(name) for name in new} & {part_of(name) for name in taken}
        new_parts = _parts(name for name in new if part_of(name) not in mixed)
        new_weights = ", ".join(sorted(name for name in new if part_of(name) in mixed))
        print0("new, from scratch: " + ", ".join(filter(None, [new_parts, new_weights])))
    return taken


def part_of(name: str) -> str:
    """The module that a weight belongs to: two levels of an encoder, one of anything else."""
    return ".".join(name.split(".")[: 3 if name.startswith("encoder.") else 1])


def _parts(names: Iterable[str]) -> str:
    """The modules that the weights `names` belong to, for a message."""
    return ", ".join(sorted({part_of(name) for name in names}))
