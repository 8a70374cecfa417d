"""Files computed from a dataset once and read by later runs. Callers recompute a damaged or missing one."""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from unipad.checkpoint import remove_unfinished


def cache_paths(root: Path, name: str) -> tuple[Path, Path]:
    """Both places for a cached file `name` of the dataset in `root`, in the order to try them: below `root` and, where
    that is read-only, in the user's cache."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root_hash = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return root / "unipad-index" / name, user_cache / "unipad" / root_hash / name


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cached .npz file; None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # a wrong checksum; np.load alone would not check every byte
                return None
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # damaged files raise zlib.error, NotImplementedError, SyntaxError, MemoryError, ...
        return None


def write_arrays(paths: tuple[Path, ...], arrays: dict) -> None:
    """Write an .npz file, atomically, to the first of `paths` that can be written; if none can, do nothing."""
    for path in paths:
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path.parent, path.name)  # of killed processes
            with open(unfinished, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(unfinished, path)
            return
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
