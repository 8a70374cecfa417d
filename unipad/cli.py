"""The command line of the scripts: their own flags, and every setting of the recipe as a flag.

A script's `Args` is a dataclass whose field `recipe` is None until a recipe is chosen. So the command line is parsed
twice: first only the flags that choose a recipe (`--modality`, `--preset`, `--config`, ...), then all flags, with the
chosen recipe's values as defaults.
"""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import tyro

from unipad.batch import OCCUPANCY_CLASSES
from unipad.config import CONVNEXT, FinetuneRecipe, OccupancyRecipe, PretrainRecipe, Recipe
from unipad.config_dict import from_dict
from unipad.data.dataset import DEFAULT_DATASET, check_recorded
from unipad.errors import UserError, check_choices, check_numbers

A = TypeVar("A")
# Ranges of the recipes' numbers, by the name of the setting, in whichever section. `nms` has an integer and a float: a
# class and an IoU.
# Integers that may be 0; all others are at least 1
MAY_BE_0 = {"frozen_stages", "fpn_start", "volume_convs", "blocks", "lidar_per_view", "importance", "noise_groups"}
MAY_BE_0 |= {"counts", "min_points", "warmup_steps", "nms", "sweeps", "feature_channels", "max_voxels"}
SIGNED = {"low", "high", "center_low", "center_high", "variance", "sources"}  # may be negative; all others may not
UP_TO_1 = {  # floats from 0 to 1
    "flip_x",
    "flip_y",
    "grid_mask",
    "norm_momentum",
    "focal_alpha",
    "min_score",
    "nms",
    "start",
    "final",
    "rise",
}
BELOW_1 = {"mask_ratio", "drop_path", "dropout", "sky", "momentum", "min_momentum"}  # floats from 0 to below 1
# Flags that choose the recipe of a new run; with --config or --resume they may only repeat the earlier run's values
ADDED_FLAGS = {"compile": False}  # flags that older runs lack, with the value that they ran with
RECIPE_FLAGS = ("task", "modality", "preset", "backbone")


def parse(kind: type[A], choose: Callable[[A], A], description: str, argv: Sequence[str] | None = None) -> A:
    """Parse the command line into the dataclass `kind`; settings of the recipe are flags with their section
    (`--optim.lr`).

    choose: maps the script's parsed flags to the defaults of all flags: the same flags with their recipe filled in, or
            the flags of an earlier run.
    argv:   the flags (default: those of this process).

    Exits with code 2 where tyro cannot parse a flag. Raises `UserError` for a flag of a section that the recipe lacks,
    for a flag that would choose another recipe than the earlier run's, and for a number out of range.
    """
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    read = partial(
        tyro.cli,
        kind,
        args=argv,
        description=description,
        console_outputs=os.environ.get("RANK", "0") == "0",
        config=(tyro.conf.AvoidSubcommands,),  # a section that is None has no flags
    )
    script_flags, _ = read(return_unknown_args=True, add_help=False)
    chosen = choose(script_flags)
    for flag in argv:
        section = re.match(r"--(\w+)\.", flag)
        if section and getattr(chosen.recipe, section[1], "unknown") is None:  # tyro refuses an unknown section
            raise UserError(f"{flag} has no effect: this recipe has no {section[1]} section; leave it out.")
    args = read(default=chosen)
    for name in RECIPE_FLAGS:
        given, expected = getattr(args, name, None), getattr(chosen, name, None)
        if given != expected:
            raise UserError(f"--{name} {given} differs from the run's --{name} {expected}; leave it out.")
    check_numbers(args)
    max_workers = max(64, 8 * (os.cpu_count() or 1))
    if args.workers is not None and args.workers > max_workers:
        raise UserError(f"--workers {args.workers} is too large for this machine; use at most {max_workers}.")
    return args


def args_of_run(args: A) -> A | None:
    """The flags of the run that `--config` or `--resume RUN` names; None without either, or for `--resume auto`, with
    which the run's flags are given again on the command line.

    Its --config, --resume, --out and --stop-at are not copied. Raises `UserError` if the run does not exist, is from
    another script or version of this project, or used a custom dataset that `args` does not repeat.
    """
    run = args.config or (Path(args.resume) if args.resume not in ("never", "auto") else None)
    if run is None:
        return None
    file = run / "config.json" if args.config is None or run.is_dir() else run
    try:
        config = json.loads(file.read_text())
        saved = from_dict(type(args), {**ADDED_FLAGS, **config["args"], "recipe": config["recipe"]})
    except OSError:
        flag = "--config" if args.config else "--resume"
        raise UserError(f"{flag} {run}: there is no {file}; give the folder of a run.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): undo its last change, or copy it again.") from None
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is from another script or another version of this project ({error}); start a new run."
        ) from None
    if args.dataset == DEFAULT_DATASET:
        check_recorded(saved.dataset, run)
    return replace(saved, config=None, resume="never", out=None, stop_at=None)


def with_preset(args: A, presets: dict[str, dict[str, Recipe]], modality: str, default: str) -> A:
    """The flags, with `modality`, `preset` (the name of the chosen preset) and `recipe` filled in.

    presets:  modality -> name -> recipe, of one task.
    modality: key of `presets`.
    default:  the preset where --data-root is given and --preset is not. Where neither is, the dataset is the synthetic
              city and the preset "tiny".
    """
    name = args.preset or (default if args.data_root else "tiny")
    check_choices(preset=(name, presets[modality]))
    recipe = presets[modality][name]
    if args.backbone:
        if recipe.camera is None:
            raise UserError(f"--backbone does not work with --modality {modality}, which has no camera; leave it out.")
        depths, widths = CONVNEXT[args.backbone]
        recipe = replace(recipe, camera=replace(recipe.camera, depths=depths, widths=widths))
    return replace(args, modality=modality, preset=name, recipe=recipe)


def check_recipe(recipe: Recipe):
    """Raises `UserError` for settings out of their range, and for those that cannot be combined."""
    for section, settings in vars(recipe).items():
        # not a dataclass: None, or `label_fraction` and `balanced`, which are no sections
        for name, value in vars(settings).items() if dataclasses.is_dataclass(settings) else ():
            flag, least = f"--{section}.{name}".replace("_", "-"), 0 if name in MAY_BE_0 else 1
            for number in _leaves(value):
                if type(number) is int and number < least and name not in SIGNED:
                    raise UserError(f"{flag} {number} must be at least {least}.")
                if type(number) is float and name in UP_TO_1 and not 0 <= number <= 1:
                    raise UserError(f"{flag} {number} must be from 0 to 1.")
                if type(number) is float and name in BELOW_1 and not 0 <= number < 1:
                    raise UserError(f"{flag} {number} must be from 0 to below 1.")
                if type(number) is float and number < 0 and name not in SIGNED:
                    raise UserError(f"{flag} {number} must not be below 0.")
    if isinstance(recipe, PretrainRecipe) and not (recipe.render.renders or recipe.render.occupancy_weight):
        raise UserError("no loss has a weight above 0; give one of them, for example --render.depth-weight 10.")
    if recipe.camera is not None and not recipe.data.cameras:
        raise UserError("--data.no-cameras does not work with a camera encoder, which this recipe has; leave it out.")
    if recipe.camera is None and recipe.data.camera_sweeps > 1:
        raise UserError("--data.camera-sweeps needs a camera encoder, which this recipe does not have; leave it out.")
    if recipe.lidar is not None and not recipe.data.sweeps:
        raise UserError("--data.sweeps 0 does not work with a LiDAR encoder, which this recipe has; give at least 1.")
    if isinstance(recipe, PretrainRecipe):
        _check_supervision(recipe)
    elif isinstance(recipe, FinetuneRecipe) and (recipe.data.sources or not recipe.data.sweeps or recipe.data.features):
        raise UserError("--data.sources, --data.features and --data.sweeps 0 are for pre-training; leave them out.")
    if isinstance(recipe, OccupancyRecipe):
        _check_occupancy(recipe)


def _check_occupancy(recipe):
    """Raises `UserError` for settings that the labels of voxels do not allow."""
    if recipe.occupancy.classes != len(OCCUPANCY_CLASSES):
        raise UserError(
            f"--occupancy.classes {recipe.occupancy.classes}: labels have {len(OCCUPANCY_CLASSES)} classes, free "
            "included; leave the flag out."
        )
    if recipe.paste is not None:
        raise UserError(
            "fine-tuning for occupancy cannot paste objects, since the labels of the voxels would lack them: set "
            '"paste" to null in the config.json.'
        )


def _check_supervision(recipe):
    """Raises `UserError` for losses without the data that they compare with."""
    data, rays, render = recipe.data, recipe.rays, recipe.render
    if rays.strategy == "patch" and data.cameras and data.image_size is not None:
        rays.check_room(*data.image_size)
    if render.photometric_weight > 0:
        if not (data.cameras and data.sources and rays.strategy == "patch"):
            raise UserError(
                "--render.photometric-weight compares patches of pixels with other frames: it needs images, "
                "--rays.strategy patch, and --data.sources, such as -1 1."
            )
        if recipe.augment.photometric or recipe.augment.grid_mask:
            raise UserError(
                "--render.photometric-weight compares colors between frames, which --augment.photometric and "
                "--augment.grid-mask change; leave them out."
            )
    elif data.sources:
        raise UserError("--data.sources has no effect without --render.photometric-weight; leave it out.")
    if (render.features_weight > 0) != (data.features is not None):
        raise UserError(
            "--data.features FOLDER and --render.features-weight need each other: give both, or turn both off with "
            "--data.features None --render.features-weight 0."
        )
    if data.features is not None and not data.cameras:
        raise UserError(
            "--data.features needs rays through the cameras' pixels: leave out --data.no-cameras, or turn "
            "features off with --data.features None --render.features-weight 0."
        )
    lidar_losses = {
        name: getattr(render, f"{name}_weight") for name in ("depth", "free_space", "sdf", "points", "occupancy")
    }
    if not data.sweeps and (used := [name for name, weight in lidar_losses.items() if weight > 0]):
        flags = " ".join(f"--render.{name.replace('_', '-')}-weight 0" for name in used)
        raise UserError(f"--data.sweeps 0 reads no LiDAR, but some losses need it: turn them off with {flags}.")
    if not data.sweeps and (rays.strategy == "depth" or not data.cameras):
        raise UserError(
            "--data.sweeps 0 reads no LiDAR: rays need cameras and --rays.strategy random, dilation or patch."
        )


def _leaves(value):
    """Yield a setting or, if it is a tuple, its entries, those of nested tuples too."""
    if isinstance(value, tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def check_frozen_stages(recipe: Recipe, sources: Sequence[Path], flag: str):
    """Raises `UserError` if the recipe would freeze random weights. sources: the checkpoints given by `flag`."""
    if recipe.camera is not None and recipe.camera.frozen_stages and not sources:
        raise UserError(
            f"this recipe does not train the camera's first stages, so their weights must come from {flag}: a run, or "
            "ImageNet weights from python -m unipad.convert; --camera.frozen-stages 0 trains them from scratch."
        )
