"""The tables of a nuScenes dataset on disk: where they are, and the indices made from them (unipad/data/index.py).

The devkit reads the tables once (half a minute and several GB of memory for full nuScenes); the indices are cached.
"""

import os
from dataclasses import fields
from functools import partial
from pathlib import Path

from unipad.data.cache import cache_paths, read_arrays, write_arrays
from unipad.data.dataset import DataError
from unipad.data.index import (
    FORMAT,
    CameraSweeps,
    Index,
    OccupancyIndex,
    SourceFrames,
    build_camera_sweeps,
    build_index,
    build_occupancy,
    build_source_frames,
)
from unipad.data.schema import open_tables, read_table
from unipad.data.splits import SPLITS, check_scenes, custom_splits, splits_of

# All tables, since the devkit opens all of them
TABLES = (
    "attribute",
    "calibrated_sensor",
    "category",
    "ego_pose",
    "instance",
    "log",
    "map",
    "sample",
    "sample_annotation",
    "sample_data",
    "scene",
    "sensor",
    "visibility",
)
LARGE_TABLES = 100e6  # bytes of all tables; if they are larger, indexing shows a progress bar


def find_root(root: str | Path, version: str) -> Path:
    """The devkit's dataroot of `version`: `root` itself or root/version; ~ is the user's home. Raises `DataError`."""
    root = Path(os.path.expanduser(root))  # unlike Path.expanduser, it never raises
    if not root.is_dir():
        raise DataError(f"--data-root {root} is not a folder; give the one that holds samples/ and {version}/.")
    for data_root in (root, root / version):
        if _has_tables(data_root / version):
            missing = [f"{t}.json" for t in TABLES if not (data_root / version / f"{t}.json").is_file()]
            if missing:
                raise DataError(f"{data_root / version} lacks {', '.join(missing)}; unpack the metadata again.")
            return data_root
    if _has_tables(root):
        raise DataError(f"--data-root {root} is the folder of the tables itself; give the one above it.")
    versions = sorted({p.parent.name for pattern in ("*/scene.json", "*/*/scene.json") for p in root.glob(pattern)})
    if versions:
        raise DataError(f"{root} has no --version {version}; it has {', '.join(versions)}.")
    raise DataError(f"{root} has no nuScenes tables; --data-root must be the folder with {version}/scene.json in it.")


def _has_tables(folder):
    return any((folder / f"{t}.json").is_file() for t in TABLES)


def samples_of_scenes(root: Path, version: str) -> dict[str, list[str]]:
    """{scene name: [sample token, ...] in the order of time}; root: from `find_root`."""
    scenes, samples = (read_table(root / version, table) for table in ("scene", "sample"))
    names = {scene["token"]: scene["name"] for scene in scenes}
    tokens = {name: [] for name in names.values()}
    for sample in sorted(samples, key=lambda sample: sample["timestamp"]):
        tokens[names[sample["scene_token"]]].append(sample["token"])
    return tokens


def load_index(root: Path, version: str, split: str) -> Index:
    """The index of a split from its cache; rebuilt, for all splits of the version, when the tables have changed.

    root: from `find_root`. The cache is root/unipad-index or, where that cannot be written, the user's cache folder; it
    is replaced atomically, so several processes may build it at the same time.
    Raises `DataError` for a split that the version does not have, and for tables that the devkit rejects.
    """
    return _load(Index, build_index, root, version, split)


def load_camera_sweeps(root: Path, version: str, split: str) -> CameraSweeps:
    """The `CameraSweeps` of a split, cached like the index of `load_index`."""
    return _load(CameraSweeps, build_camera_sweeps, root, version, split, "-camera-sweeps")


def load_source_frames(root: Path, version: str, split: str, offsets: tuple[int, ...]) -> SourceFrames:
    """The `SourceFrames` at some offsets of a split, cached like the index of `load_index`."""
    ending = "-sources" + "".join(f"{offset:+d}" for offset in offsets)
    return _load(SourceFrames, partial(build_source_frames, offsets=offsets), root, version, split, ending)


def load_occupancy(root: Path, version: str, split: str) -> OccupancyIndex:
    """The `OccupancyIndex` of a split, cached like the index of `load_index`."""
    return _load(OccupancyIndex, build_occupancy, root, version, split, "-occupancy")


def _load(kind, build, root, version, split, ending=""):
    """The index of a split, of class `kind`: cached, or made by `build`. ending: of the cache file's name."""
    splits = tuple(splits_of(root, version).values())
    if split not in splits:
        owner = next(
            (f"; {split} belongs to --version v1.0-{v}" for v, names in SPLITS.items() if split in names.values()), ""
        )
        raise DataError(f"--version {version} has no split {split}: it has {' and '.join(splits)}{owner}.")
    state = f"format {FORMAT} {tables_state(root, version)}"
    for path in cache_paths(root, f"{version}-{split}{ending}.npz"):
        index = _read_index(kind, path, state)
        if index is not None:
            return index
    size = sum(t.stat().st_size for t in (root / version).glob("*.json"))
    built = _build_all(build, root, version, splits, verbose=size > LARGE_TABLES)
    for name, index in built.items():
        write_arrays(cache_paths(root, f"{version}-{name}{ending}.npz"), {"state": state, **vars(index)})
    return built[split]


def tables_state(root: Path, version: str) -> str:
    """A string that changes when the tables do: their names, sizes and modification times."""
    tables = sorted((root / version).glob("*.json"))
    return " ".join(f"{t.name}:{t.stat().st_size}:{t.stat().st_mtime_ns}" for t in tables)


def _read_index(kind, path, state):
    """The index at `path`, of class `kind`; None where there is none or the tables have changed."""
    arrays = read_arrays(path)
    if arrays is None or arrays.get("state") != state or not {f.name for f in fields(kind)} <= arrays.keys():
        return None
    return kind(**{f.name: arrays[f.name] for f in fields(kind)})


def _build_all(build, root, version, splits, verbose):
    """{split: its index, made by `build`} from the tables; `verbose` shows progress."""
    # Imported only here: a cached index does without the devkit, which takes seconds to import, with matplotlib.
    from nuscenes.utils.splits import create_splits_scenes

    try:
        nusc = open_tables(root, version, verbose)
        custom = custom_splits(root, version)
        scenes = create_splits_scenes() | custom
        others = {split: scenes[split] for split in splits if split not in custom}
        check_scenes(root / version / "splits.json", custom, others, known={scene["name"] for scene in nusc.scene})
        return {split: build(nusc, split, set(scenes[split]), verbose) for split in splits}
    except DataError:
        raise
    except Exception as error:  # a fault that our checks miss may raise anything in the devkit, which trusts the tables
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{root / version} is not a complete nuScenes dataset ({reason}); unpack it again.") from error
