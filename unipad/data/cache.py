"""Files computed from a dataset once and read by later runs. A damaged or missing one is computed again."""

import contextlib
import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from unipad.checkpoint import remove_unfinished


def cache_paths(root: Path, name: str) -> tuple[Path, Path]:
    """Where to cache a file of this name: next to the data or, if that is read-only, in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return root / "unipad-index" / name, user / "unipad" / folder / name


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cached .npz file; None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # reading the arrays would not check every byte of the file
                return None
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # damaged files raise zlib.error, NotImplementedError, SyntaxError, MemoryError, ...
        return None


def write_arrays(paths: tuple[Path, ...], arrays: dict) -> None:
    """Write an .npz file to the first of `paths` that can be written, if any; it is replaced atomically."""
    for path in paths:
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(path.parent, path.name)
            with open(part, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(part, path)
            return
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
