"""Which scenes belong to which split: nuScenes' splits, and custom splits in `<version>/splits.json`:

    {"city_train": ["scene-1", "scene-2"], "city_val": ["scene-3"]}

The devkit reads this file too, so its evaluation supports custom splits. A split whose name ends in _train,
_val or _test has that purpose. Names of nuScenes' splits are refused: the devkit would use nuScenes' scenes.
"""

import json
import re
from pathlib import Path

from unipad.data.dataset import DataError

# {suffix of the version: {purpose: split}} of nuScenes' splits
SPLITS = {
    "trainval": {"train": "train", "val": "val"},
    "test": {"test": "test"},
    "mini": {"train": "mini_train", "val": "mini_val"},
}
PURPOSES = ("train", "val", "test")
# Names of all of nuScenes' splits in the devkit; train_detect and train_track are two parts of train, not used here
RESERVED = {"train", "val", "test", "mini_train", "mini_val", "train_detect", "train_track"}


def splits_of(root: Path, version: str) -> dict[str, str]:
    """{purpose: split} of a version; a split without a purpose has its name as key. root: from `tables.find_root`.

    A custom split replaces nuScenes' split of the same purpose. Raises `DataError` for a version without any splits,
    and for a malformed splits.json.
    """
    custom = {}
    for name in custom_splits(root, version):
        purpose = _purpose(name) if _purpose(name) in PURPOSES else name
        if purpose in custom:
            raise DataError(f"{root / version}/splits.json has two splits for {purpose}, {custom[purpose]} and {name}.")
        custom[purpose] = name
    splits = SPLITS.get(version.rpartition("-")[2], {}) | custom
    if not splits:
        versions = ", ".join(f"v1.0-{suffix}" for suffix in SPLITS)
        raise DataError(
            f"--version {version} is not known; use {versions}, or list its scenes in {root / version}/splits.json "
            "(see docs/data.md)."
        )
    return splits


def custom_splits(root: Path, version: str) -> dict[str, list[str]]:
    """{split: names of its scenes} of `<version>/splits.json`; {} without such a file. Raises `DataError`
    for a malformed one."""
    file = root / version / "splits.json"
    try:
        splits = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        raise DataError(f"{file} is not a JSON file; write {EXAMPLE} or remove it.") from None
    if not isinstance(splits, dict) or not all(
        isinstance(scenes, list) and all(isinstance(scene, str) for scene in scenes) for scenes in splits.values()
    ):
        raise DataError(f"{file} must map names of splits to lists of names of scenes, such as {EXAMPLE}.")
    for name, scenes in splits.items():
        if name in RESERVED:
            raise DataError(f"{file} names a split {name}, which is nuScenes' own; call it city_{name} or the like.")
        if not re.fullmatch(r"\w[\w.-]*", name):  # files and folders are named after it
            raise DataError(f"{file} names a split {name!r}; use letters, digits, '_', '-' and '.' only.")
        if not scenes:
            raise DataError(f"{file} has no scene in its split {name}; list some, or remove the split.")
    return splits


EXAMPLE = '{"city_train": ["scene-1"], "city_val": ["scene-2"]}'


def check_scenes(file: Path, custom: dict[str, list[str]], others: dict[str, list[str]], known: set[str]):
    """Raises `DataError` if a custom split names a scene that is not `known`, or if a scene is both for training and
    for validation.

    custom: from `custom_splits`. others: the scenes of nuScenes' splits that are used along with them.
    """
    for name, scenes in custom.items():
        if unknown := [scene for scene in scenes if scene not in known]:
            raise DataError(f"{file} has the scene {unknown[0]} in its split {name}, but scene.json does not.")
    trained, validated = (
        {scene: name for name, scenes in (others | custom).items() if _purpose(name) == purpose for scene in scenes}
        for purpose in ("train", "val")
    )
    if both := sorted(trained.keys() & validated.keys()):
        raise DataError(
            f"with {file}, the scene {both[0]} is both for training ({trained[both[0]]}) and for validation "
            f"({validated[both[0]]}); choose one, or define both splits in the file."
        )


def _purpose(split):
    """What a split is for: one of PURPOSES, or another word."""
    return split.rpartition("_")[2]
