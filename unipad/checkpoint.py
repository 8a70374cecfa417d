"""Checkpoints: written atomically, read as data and never as code, loaded whole or in part (such as an encoder)."""

import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from unipad.config import AnyRecipe, Recipe
from unipad.config_dict import from_dict
from unipad.errors import UserError
from unipad.exit import has_ended


def write_checkpoint(state: dict, file: Path):
    """Save in PyTorch's format. A crash leaves the previous file intact."""
    _write(file, lambda f: torch.save(state, f))


SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


def write_safetensors(weights: dict[str, torch.Tensor], file: Path):
    """Save in the format of https://github.com/huggingface/safetensors: 8 bytes with the length of the header, the
    header in JSON, the tensors' bytes. A crash leaves the previous file intact.

    weights: of the types in `SAFETENSORS_TYPES`.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    # wide types first: then every tensor begins at a multiple of its element's size, as readers that map the file need
    tensors = dict(sorted(weights.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            f.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    _write(file, write)


def _write(file, write):
    """Call `write` with a file of a temporary name, open for bytes, then rename it."""
    remove_unfinished(file.parent, file.name)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        unfinished.replace(file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        # torch's zip writer raises its own error on top of the file's OSError, which says what went wrong
        while error and not isinstance(error, OSError):
            error = error.__context__
        if error:
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise


def remove_unfinished(folder: Path, name: str = "*"):
    """Remove unfinished files `.<name>.<process id>` that killed processes left in `folder`; name: a glob pattern."""
    for file in folder.glob(f".{name}.*"):
        process = file.suffix[1:]
        if process.isdigit() and has_ended(int(process)):
            with contextlib.suppress(OSError):
                file.unlink()


def read_checkpoint(file: Path, lazily: bool = False) -> dict:
    """Load a checkpoint as data, never as code, onto the CPU. Raises `UserError` for one that is missing or unreadable.

    lazily: map the file into memory, so that weights are read when they are used; no checksums are checked.
    """
    try:
        damaged = None if lazily else _damaged_record(file)
        if damaged is None:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=lazily or None)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {file}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder without checkpoints/last.pt; give a run or a file.") from None
    except (MemoryError, PermissionError):  # `exit_on_user_error` has sentences for them
        raise
    except Exception as error:
        raise UserError(_why_unreadable(file, error)) from None
    raise UserError(
        f"{file} is damaged: its record {damaged} has another checksum than when it was written; copy it again."
    )


def _damaged_record(file):
    """The first record of a zip file with a wrong CRC, which PyTorch does not check; None: intact, or no zip file."""
    if file.is_dir() or not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


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
    """The path of a run's last checkpoint, or None."""
    file = run / "checkpoints" / "last.pt"
    return file if file.exists() else None


def find_checkpoint(path: Path) -> Path:
    """The file that `path` means: a checkpoint itself, a run's last one, or that of the newest run in a folder."""
    newest = max(path.glob("*/checkpoints/last.pt"), default=None, key=lambda file: file.stat().st_mtime)
    return last_checkpoint(path) or newest or path


def read_run(path: Path, lazily: bool = False) -> tuple[dict, Recipe, Path]:
    """(last checkpoint, recipe, folder) of a run; of a checkpoint outside a run, the folder that contains it.

    path:   as for `find_checkpoint`.
    lazily: as for `read_checkpoint`.
    Raises `UserError` if there is no such checkpoint, or it has no model and recipe.
    """
    file = find_checkpoint(path)
    saved = read_checkpoint(file, lazily)
    try:
        _check_types(saved, {"model": dict, "step": int})
        recipe = recipe_of(saved["config"])
        _check_types(saved["config"], {"args": dict})
        _check_strings(saved["config"]["args"], ("dataset", "version", "data_root"))
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{file} has no model with a recipe of this version of the project: {str(error).rstrip('.')}."
        ) from None
    return saved, recipe, file.parent.parent if file.parent.name == "checkpoints" else file.parent


def recipe_of(config) -> Recipe:
    """The recipe of a checkpoint's `config`. Raises TypeError if JSON cannot hold the config or it has no valid recipe;
    `UserError` where settings of the recipe contradict each other."""
    _check_plain(config)
    _check_types(config, {"recipe": dict})
    return from_dict(AnyRecipe, config["recipe"])


def _check_plain(config):
    """Raises TypeError unless a config consists of what JSON can hold, so that two configs can be compared."""
    try:
        json.dumps(config, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise TypeError(f"its config has an impossible value: {error}") from None


def read_training(file: Path) -> dict:
    """The last checkpoint of a training run, to resume it. Raises `UserError` for anything else."""
    saved = read_checkpoint(file)
    try:
        dicts = ("model", "optimizer", "scaler", "metrics", "config")
        _check_types(saved, {**dict.fromkeys(dicts, dict), "step": int, "validated": int})
        _check_plain(saved["config"])
        _check_types(saved["config"], {"args": dict, "recipe": dict, "steps": int})
        _check_metrics(saved["metrics"])
        if not 0 < saved["step"] <= saved["config"]["steps"]:
            raise TypeError(f"step {saved['step']} of {saved['config']['steps']}")
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{file} is not the checkpoint of a training run of this version of the project ({error}): copy another "
            "checkpoint of the run over it, or start a new run."
        ) from None
    return saved


def _check_types(values, types):
    """Raises TypeError unless `values` is a dict that has all keys of `types`, with values of these types."""
    for name, kind in types.items():
        if not isinstance(values, dict) or name not in values:
            raise TypeError(f"it has no {name}")
        # exactly `kind`, since a bool is an int too; but an OrderedDict is a dict
        if type(values[name]) is not kind and not (kind is dict and isinstance(values[name], dict)):
            raise TypeError(f"its {name} is a {type(values[name]).__name__}")


def _check_strings(args, flags):
    """Raises TypeError unless each of `flags` is a string in `args`, or None, or missing."""
    for flag in flags:
        if not isinstance(args.get(flag), str | None):
            raise TypeError(f"its {flag} is a {type(args[flag]).__name__}")


def _check_metrics(metrics):
    """Raises TypeError unless `metrics` is {name: number}, or such dicts under "before", "after" or both."""
    nested = [isinstance(values, dict) for values in metrics.values()]
    dicts = list(metrics.values()) if any(nested) else [metrics]
    if len(set(nested)) > 1 or any(values.keys() != dicts[0].keys() for values in dicts):
        raise TypeError("its metrics differ in their names")
    if not all(type(value) in (float, int) for values in dicts for value in values.values()):
        raise TypeError("its metrics are no numbers")


def tensor_fault(name: str, weight, target: torch.Tensor) -> str | None:
    """Why the value `weight` of a checkpoint cannot be loaded into the tensor `target`, as text; None if it can."""
    if not isinstance(weight, torch.Tensor):
        return f"{name} is a {type(weight).__name__}"
    if weight.shape != target.shape:
        return f"{name} has the shape {tuple(weight.shape)} instead of {tuple(target.shape)}"
    if weight.is_meta or weight.layout != torch.strided:
        return f"{name} has no values in memory"
    if weight.dtype not in (*FLOATS, target.dtype):
        return f"{name} has the type {weight.dtype} instead of {target.dtype}"
    return None if weight.isfinite().all() else f"{name} has values that are not finite"


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # converted to the model's type when loaded


def load_weights(net: nn.Module, weights: dict, path: Path):
    """Load `weights`, which must be all that `net` has. Raises `UserError`, which names their file `path`, if not."""
    if fault := weights_fault(net.state_dict(), weights):
        raise UserError(f"the weights of {path} do not fit the recipe: {fault}.")
    net.load_state_dict(weights)


def weights_fault(mine: dict[str, torch.Tensor], weights: dict) -> str | None:
    """Why `weights` of a checkpoint do not fit the state dict `mine`, as text; None if they do."""
    for names, what in ((mine.keys() - weights.keys(), "missing"), (weights.keys() - mine.keys(), "unknown")):
        if names:
            return f"{len(names)} are {what}, such as {min(map(str, names))}"
    return next(filter(None, (tensor_fault(name, weights[name], target) for name, target in mine.items())), None)


def take_weights(net: nn.Module, prefix: str, paths: Sequence[Path], flag: str, print0: Callable) -> set[str]:
    """Load the weights of `net` whose names begin with `prefix`, those that `paths` have, and report what was taken.

    paths:  runs or checkpoints, as for `find_checkpoint`; where several have a weight, the last one wins.
    flag:   the flag that named them, for messages.
    print0: called with a line per path, which says how many weights were taken and which were ignored; then with a
            line of those that keep their random initialization.

    Returns the names taken. Raises `UserError` for a file in which none of the weights is found or one does not fit,
    and where weights of the camera's frozen stages are in none of the files.
    """
    mine = {name: w for name, w in net.state_dict().items() if name.startswith(prefix)}
    taken = set()
    for path in paths:
        file = find_checkpoint(path)
        saved = read_checkpoint(file)
        theirs = saved.get("model") if isinstance(saved, dict) else None
        theirs = theirs if isinstance(theirs, dict) else {}
        theirs = {name: w for name, w in theirs.items() if isinstance(name, str)}
        common = {name: theirs[name] for name in mine if name in theirs}
        faults = [fault for name, w in common.items() if (fault := tensor_fault(name, w, mine[name]))]
        if not common or faults:
            has = _parts(n for n in theirs if n.startswith(prefix))
            what = f"its {faults[0]}" if faults else f"of {_parts(mine)} it has {has or 'none'}"
            fix = "" if has else ", or convert weights of another project with python -m unipad.convert"
            raise UserError(f"{flag} {path} does not fit: {what}; give a run whose preset has the same encoder{fix}.")
        net.load_state_dict(common, strict=False)
        taken |= common.keys()
        ignored = _parts(theirs.keys() - common.keys())
        ignored = f"; ignored {ignored}, not part of this model" if ignored else ""
        millions = sum(w.numel() for w in common.values()) / 1e6
        print0(f"{flag} {file}: took {millions:.2f} M weights, {_parts(common)}{ignored}")
    new = mine.keys() - taken
    frozen = [name for name, p in net.named_parameters() if name in new and not p.requires_grad]
    frozen = [name for name in frozen if name.startswith("encoder.camera.")]
    if paths and frozen:
        raise UserError(
            f"{flag} {' '.join(map(str, paths))} has no weights of {part_of(frozen[0])}, whose first stages this "
            "recipe does not train; name a run or checkpoint that has them too."
        )
    if paths and new:
        # parts that were only partly taken: their new weights are listed one by one
        mixed = {part_of(name) for name in new} & {part_of(name) for name in taken}
        new_parts = _parts(name for name in new if part_of(name) not in mixed)
        new_weights = ", ".join(sorted(name for name in new if part_of(name) in mixed))
        print0("new, from scratch: " + ", ".join(filter(None, [new_parts, new_weights])))
    return taken


def part_of(name: str) -> str:
    """The part of a model that a weight belongs to: such as `encoder.lidar.neck`, or `head` outside the encoder."""
    return ".".join(name.split(".")[: 3 if name.startswith("encoder.") else 1])


def _parts(names: Iterable[str]) -> str:
    """The parts that the weights `names` belong to, for a message."""
    return ", ".join(sorted({part_of(name) for name in names}))
