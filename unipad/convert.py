"""Convert checkpoints of UniPAD and ImageNet ConvNeXts to this project's ("ours"), and ours to UniPAD's, or their
encoders for other projects.

    python -m unipad.convert epoch_12.pth camera.pt                    # UniPAD's own: any released config
    python -m unipad.convert convnext_small_1k_224_ema.pth convnext.pt # ImageNet's ConvNeXt, for a camera encoder
    python -m unipad.convert outputs/train-lidar/<time> lidar.pth      # ours, for UniPAD's mmdet3d
    python -m unipad.convert --merge CAMERA LIDAR fusion.pt            # both encoders, to initialize fusion
    python -m unipad.convert RUN encoder.pth --to mmdet3d              # the encoder, for another project's networks

Use the result with `train.py --init`, `finetune.py --pretrained` or, if it is a whole detector, `eval.py`. Files are
read as data: nothing in them is executed. ConvNeXts may be the official ones, timm's (`pytorch_model.bin`),
torchvision's or mmpretrain's. UniPAD's may have weights of spconv 1, as the released ones do, or of spconv 2.

All weights must match one to one, unless --no-strict. Two kinds of UniPAD's weights are dropped, and restored on the
way back: mmdet3d's `code_weights` of boxes, which are a setting here, and norms of stages that the FPN never reads.
ImageNet classifiers and optimizer states are dropped for good.

With --to, RUN may also be a checkpoint of UniPAD. What has no counterpart in the other project, or here, is listed
(`unipad.export`), with the lines of a config that fit. OUT is in the format of safetensors if its name ends so.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from unipad.checkpoint import (
    find_checkpoint,
    part_of,
    read_checkpoint,
    recipe_of,
    tensor_fault,
    write_checkpoint,
    write_safetensors,
)
from unipad.config import (
    CONVNEXT,
    Detect,
    DetectRecipe,
    LidarConfig,
    OccupancyRecipe,
    PretrainRecipe,
    Recipe,
    SegmentRecipe,
)
from unipad.config_dict import to_dict
from unipad.errors import UserError, check_choices
from unipad.exit import exit_on_user_error
from unipad.export import PROJECTS, export
from unipad.model.camera import ConvNeXt
from unipad.model.detect import Detector
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.names import CODE_WEIGHTS, from_imagenet, from_original, to_original
from unipad.recipes import DEFAULT_PRESET, DETECT, PRETRAIN

BACKBONE = "encoder.camera.backbone."
FRAME_FUSION = "encoder.frame_fusion.trans_conv.0.weight"  # mixes the channels of all camera frames' volumes
CODE_WEIGHTS_LIKE = torch.tensor(Detect().code_weights)  # a tensor of the shape and type that code weights must have
CAMERA_RATE = 12.0  # Hz; the original takes camera sweep n to be n / CAMERA_RATE seconds old
# Prefixes of the classifier in an ImageNet checkpoint, and of the norm before it
CLASSIFIER = ("head.", "classifier.", "norm.", "backbone.norm")


@dataclass
class Report:
    """What was done with the weights of one file."""

    taken: dict = field(default_factory=dict)  # name -> tensor
    missing: list = field(default_factory=list)  # names only in the model
    unexpected: list = field(default_factory=list)  # keys only in the file
    unfit: list = field(default_factory=list)  # sentences: name in both, and why its value cannot be taken
    notes: list = field(default_factory=list)  # which weights were dropped or added on purpose

    @property
    def faults(self) -> int:
        """Number of weights that keep the file from fitting."""
        return len(self.missing) + len(self.unexpected) + len(self.unfit)

    def __str__(self):
        columns = {"taken": self.taken, "missing": self.missing, "unexpected": self.unexpected, "unfit": self.unfit}
        # split: entries of `unfit` are sentences that begin with the weight's name
        counts = {column: Counter(part_of(key.split()[0]) for key in keys) for column, keys in columns.items()}
        lines = [f"{'part':<32}" + "".join(f"{column:>12}" for column in columns)]
        for part in sorted(set().union(*counts.values())):
            lines.append(f"{part:<32}" + "".join(f"{count[part]:>12}" for count in counts.values()))
        lines.append(f"{'all':<32}" + "".join(f"{len(keys):>12}" for keys in columns.values()))
        for column, keys in columns.items():
            if column != "taken" and keys:
                more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
                lines.append(f"{column}: {', '.join(keys[:8])}{more}")
        return "\n".join([*lines, *self.notes])


def read_weights(path: Path) -> tuple[dict, str, dict]:
    """(state dict, kind, all contents) of a file or run folder; kind: "unipad", "convnext" or "ours".

    Raises `UserError` for a file that is none of them.
    """
    file = find_checkpoint(path)
    saved = read_checkpoint(file)
    config = saved.get("config") if isinstance(saved, dict) else None
    if isinstance(config, dict) and "recipe" in config and isinstance(saved.get("model"), dict):
        saved_recipe(saved, file)  # only to raise its error early
        return saved["model"], "ours", saved
    state = saved
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise UserError(f"{file} has no weights: it is a {type(saved).__name__}, not a state dict.")
    state = {str(k).removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    # how many of the weights have names of UniPAD, and of ConvNeXt
    unipad_count, convnext_count = (len(rename(state)[0]) for rename in (from_original, from_imagenet))
    if not unipad_count and not convnext_count:
        example = f" (such as {next(iter(state))})" if state else ""
        raise UserError(
            f"{file} is not a checkpoint of UniPAD, of a ConvNeXt or of this project: "
            f"none of its {len(state)} weights{example} has a known name."
        )
    return state, "unipad" if unipad_count >= convnext_count else "convnext", saved


def convert_unipad(state: dict[str, torch.Tensor], preset: str | None = None) -> tuple[dict, Report]:
    """A state dict of the original as (checkpoint of ours, `Report`).

    preset: the recipe that it belongs to; None: one that fits, preferably the default, or else the one that fits best.
    """
    ours, unknown = from_original(state)
    code_weights = state.get(CODE_WEIGHTS)
    unfit = []
    if code_weights is not None and (fault := tensor_fault(CODE_WEIGHTS, code_weights, CODE_WEIGHTS_LIKE)):
        code_weights, unfit = None, [fault]
    presets, modality = _presets(ours)
    check_choices(preset=(preset, presets))
    reports = {}
    default = DEFAULT_PRESET[modality]
    # tiny ones, listed first, come last; UniPAD has no recipes with `sources`, whose modules are those of others
    candidates = [default, *(n for n in reversed(presets) if n != default and not presets[n].data.sources)]
    for name in [preset] if preset else candidates:
        recipe = _with_sizes(presets[name], ours, code_weights)
        report = Report(unexpected=[key for key in unknown if key != CODE_WEIGHTS], unfit=unfit.copy())
        _compare(ours, _targets(recipe), report, _unread_norms(recipe))
        reports[name] = (report, recipe)
        if not report.faults:
            break
    name = min(reports, key=lambda n: reports[n][0].faults)
    report, recipe = reports[name]
    report.notes.insert(0, f"recipe: {modality} {name}" + ("" if preset else " (--preset chooses another)"))
    if code_weights is not None:
        report.notes.append(f"dropped: {CODE_WEIGHTS}, a setting of the recipe")
    args = {"modality": modality, "preset": name} | ({"task": "detect"} if isinstance(recipe, DetectRecipe) else {})
    return {"model": report.taken, "step": 0, "config": {"args": args, "recipe": to_dict(recipe), "steps": 0}}, report


def convert_convnext(state: dict[str, torch.Tensor]) -> tuple[dict, Report]:
    """An ImageNet ConvNeXt as (checkpoint of a camera backbone, `Report`)."""
    ours, unknown = from_imagenet(state)
    depths, widths = _convnext_sizes(ours)
    if not depths:
        raise UserError("the file has no ConvNeXt blocks with layer scale: it cannot initialize this encoder.")
    with torch.device("meta"):
        targets = ConvNeXt(depths, widths, out_stages=()).state_dict()
    report = Report(unexpected=[key for key in unknown if not key.startswith(CLASSIFIER)])
    _compare(ours, targets, report)
    report.taken = {BACKBONE + name: w for name, w in report.taken.items()}
    size = next((name for name, sizes in CONVNEXT.items() if sizes == (depths, widths)), None)
    report.notes += [f"ConvNeXt {size or f'of {depths} blocks and {widths} channels'}; classifier dropped"]
    return {"model": report.taken, "config": {"backbone": size}}, report


def convert_ours(saved: dict, spconv: int = 1) -> tuple[dict, Report]:
    """A checkpoint of ours as (mmcv's dict with the original's keys, `Report`).

    spconv: version, 1 or 2, whose layout the weights of sparse convolutions get.
    """
    recipe = saved_recipe(saved)
    report = Report()
    _compare(saved["model"], _targets(recipe), report)
    state, unknown = to_original(report.taken, spconv)
    report.notes += [f"dropped: {name}, which the original does not have" for name in unknown]
    for key, (width, fill) in _unread_norms(recipe).items():
        state["img_backbone." + key.removeprefix(BACKBONE)] = torch.full((width,), fill)
        report.notes.append(f"supplied: {key}, which is never read")
    if recipe.camera is not None and recipe.data.camera_sweeps > 1 and recipe.data.camera_rate != CAMERA_RATE:
        lags = f"n / {recipe.data.camera_rate} s" if recipe.data.camera_rate else "measured ones"
        report.notes.append(f"trained with time lags of camera sweeps of {lags}; the original has n / {CAMERA_RATE} s")
    if isinstance(recipe, DetectRecipe):
        state[CODE_WEIGHTS] = torch.tensor(recipe.detect.code_weights)
        report.notes.append(f"supplied: {CODE_WEIGHTS}, from the recipe")
    return {"meta": {"config": saved["config"]}, "state_dict": state}, report


def merge(camera: dict, lidar: dict) -> tuple[dict, Report]:
    """The encoders of a camera and of a LiDAR checkpoint of ours, as (checkpoint to initialize fusion, `Report`).

    Heads are dropped: they were trained on other volumes. The convolution that fuses the volumes is left out, so
    training initializes it.
    """
    camera_recipe, lidar_recipe = saved_recipe(camera), saved_recipe(lidar)
    if camera_recipe.camera is None or not isinstance(lidar_recipe.lidar, LidarConfig):
        raise UserError("--merge takes a checkpoint with a camera encoder first and one with a LiDAR encoder second.")
    if camera_recipe.grid != lidar_recipe.grid or type(camera_recipe) is not type(lidar_recipe):
        raise UserError("--merge takes checkpoints with the same grid, both pre-trained or both fine-tuned.")
    presets = DETECT if isinstance(camera_recipe, DetectRecipe) else PRETRAIN
    recipe = presets["fusion"][DEFAULT_PRESET["fusion"]]
    recipe = replace(recipe, grid=camera_recipe.grid, camera=camera_recipe.camera, lidar=lidar_recipe.lidar)
    sweep_settings = {name: getattr(camera_recipe.data, name) for name in ("camera_sweeps", "camera_rate")}
    recipe = replace(recipe, data=replace(recipe.data, **sweep_settings))
    report = Report()
    camera_parts = ("encoder.camera.", "encoder.frame_fusion.", "encoder.lift_convs.")
    lidar_parts = ("encoder.lidar.", "encoder.lidar_convs.")
    for saved, prefixes in ((camera, camera_parts), (lidar, lidar_parts)):
        taken = {name: w for name, w in saved["model"].items() if name.startswith(prefixes)}
        report.taken |= taken
        others = {part_of(name) for name in saved["model"].keys() - taken}
        report.notes += [f"dropped: {part}" for part in sorted(others)]
    args = {"modality": "fusion", "preset": DEFAULT_PRESET["fusion"]}
    return {"model": report.taken, "step": 0, "config": {"args": args, "recipe": to_dict(recipe), "steps": 0}}, report


def saved_recipe(saved: dict, file: Path | str = "the checkpoint") -> Recipe:
    """The recipe of a checkpoint of ours. Raises `UserError`, which names `file`, for one from another version of this
    project."""
    try:
        return recipe_of(saved["config"])
    except TypeError as error:
        raise UserError(f"{file} is from another version of this project ({error}): train or convert again.") from None


def _presets(ours):
    """(presets of the task and modality that weights `ours`, under our names, belong to; the modality)."""
    camera, lidar = (any(n.startswith(f"encoder.{part}.") for n in ours) for part in ("camera", "lidar"))
    modality = "fusion" if camera and lidar else "camera" if camera else "lidar"
    fine_tuned = any(name.startswith("head.") for name in ours)
    return (DETECT if fine_tuned else PRETRAIN)[modality], modality


def _with_sizes(recipe, ours, code_weights):
    """`recipe` with the ConvNeXt size, number of camera sweeps, learnable token and code weights that a file of the
    original has, and with the original's sweep times and rounding in voxel pooling. ours: its weights, our names."""
    if recipe.camera is not None:
        backbone = {name.removeprefix(BACKBONE): w for name, w in ours.items() if name.startswith(BACKBONE)}
        depths, widths = _convnext_sizes(backbone)
        camera = replace(recipe.camera, truncate=recipe.camera.view == "pool")
        recipe = replace(recipe, camera=replace(camera, depths=depths, widths=widths) if depths else camera)
    if FRAME_FUSION in ours:
        # 1, 1 and max: a damaged weight may have any shape
        out_width, in_width, *_ = *ours[FRAME_FUSION].shape, 1, 1
        sweeps = max(1, in_width // max(1, out_width))
        recipe = replace(recipe, data=replace(recipe.data, camera_sweeps=sweeps, camera_rate=CAMERA_RATE))
    if isinstance(recipe.lidar, LidarConfig) and "encoder.lidar.mask_token" in ours:
        recipe = replace(recipe, lidar=replace(recipe.lidar, learnable_token=True))
    if code_weights is not None and isinstance(recipe, DetectRecipe):
        # equal ones stay as they are: converted from fp32, 0.2 would become 0.200000003
        if not torch.equal(code_weights, torch.tensor(recipe.detect.code_weights)):
            recipe = replace(recipe, detect=replace(recipe.detect, code_weights=tuple(code_weights.tolist())))
    return recipe


def _convnext_sizes(state):
    """(blocks of each stage, channels of each stage), from the layer scales `gamma`: one per block, of all channels."""
    widths = {int(n.split(".")[1]): w.numel() for n, w in state.items() if re.fullmatch(r"stages\.\d+\.0\.gamma", n)}
    blocks = Counter(int(n.split(".")[1]) for n in state if re.fullmatch(r"stages\.\d+\.\d+\.gamma", n))
    stages = sorted(widths)
    return tuple(blocks[i] for i in stages), tuple(widths[i] for i in stages)


def _targets(recipe):
    """{name: meta tensor} of all weights of a recipe's model."""
    models = {
        PretrainRecipe: Pretrain,
        DetectRecipe: Detector,
        SegmentRecipe: Segmenter,
        OccupancyRecipe: OccupancyModel,
    }
    with torch.device("meta"):
        net = models[type(recipe)](recipe)
    return net.state_dict()


def _unread_norms(recipe):
    """Norms that the original has but never reads, of stages before the FPN's first: name -> (channels, initial value).

    The original's backbone outputs all stages to mmdet's FPN or, if that has a single level, only the last one; then no
    norm is unread.
    """
    camera = recipe.camera
    if camera is None or camera.fpn_levels == 1:
        return {}
    initial = {"weight": 1.0, "bias": 0.0}
    return {
        f"{BACKBONE}norm{i}.{name}": (camera.widths[i], fill)
        for i in range(camera.fpn_start)
        for name, fill in initial.items()
    }


def _compare(state, targets, report, unread=()):
    """Add each weight of `state`, and those missing in it, to `report`; targets: the model's weights; unread: names to
    drop."""
    for name, weight in state.items():
        if name in unread:
            report.notes.append(f"dropped: {name}, which is never read")
        elif name not in targets:
            report.unexpected.append(str(name))
        elif fault := tensor_fault(name, weight, targets[name]):
            report.unfit.append(fault)
        else:
            report.taken[name] = weight
    report.missing += [name for name in targets if name not in state]


@dataclass(frozen=True)
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # SOURCE OUT: a file or run, and the file to write; see --merge
    kind: Literal["auto", "unipad", "convnext", "ours"] = "auto"  # what SOURCE is
    merge: bool = False  # merge the encoders of two checkpoints, ours or UniPAD's: CAMERA LIDAR OUT
    preset: str | None = None  # UniPAD: the recipe that SOURCE belongs to (default: the one that fits)
    # ours: write only the encoder, for this project; OUT ends with .safetensors for that format, else it is PyTorch's
    to: Literal["mmdet3d", "openpcdet", "pointcept"] | None = None
    spconv: Literal[1, 2] | None = None  # ours, for UniPAD: layout of sparse convolutions' weights in OUT (default: 1)
    strict: bool = True  # refuse a file unless all weights match
    overwrite: bool = False  # replace OUT if it exists


def main(args: Args):
    if len(args.paths) != (3 if args.merge else 2):
        raise UserError("give the input and the output: SOURCE OUT, or --merge CAMERA LIDAR OUT.")
    *sources, out = args.paths
    if any(out.resolve() == path.resolve() for path in sources):
        raise UserError(f"{out} would overwrite its own source; give another file.")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of the file to write in it.")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} exists; give another file, or --overwrite to replace it.")
    if args.merge and args.preset:
        raise UserError(
            f"--preset {args.preset} has no effect with --merge, whose sources have their own; leave it out."
        )
    if args.to and (args.merge or args.spconv):
        raise UserError(f"--to {args.to} has layouts of its own, of one encoder: leave --merge and --spconv out.")
    if out.suffix == ".safetensors" and not args.to:
        raise UserError(f"{out} would have no config, which this project reads: end its name with .pt, or use --to.")
    write = write_checkpoint
    if args.to:
        saved = _as_ours(sources[0], args)
        weights, text = export(saved["model"], saved_recipe(saved), args.to, sources[0])
        print(text)
        result = {PROJECTS[args.to].wrapper: weights}
        if out.suffix == ".safetensors":
            result, write = weights, write_safetensors
    else:
        result, report = _convert(sources, args)
        print(report)
        _refuse_faults(report, sources[0], args)
        weights = report.taken
    out.parent.mkdir(parents=True, exist_ok=True)
    write(result, out)
    print(f"{out}: {sum(w.numel() for w in weights.values()) / 1e6:.2f} M weights")


def _convert(sources, args):
    """(checkpoint, `Report`) of a conversion to ours or UniPAD's."""
    if args.merge:
        return merge(*(_as_ours(path, args) for path in sources))
    state, kind, saved = _read(sources[0], args)
    if kind == "unipad":
        return convert_unipad(state, args.preset)
    if kind == "convnext":
        return convert_convnext(state)
    return convert_ours(saved, args.spconv or 1)


def _read(path, args):
    """What `read_weights` returns. Raises `UserError` if it is not of the kind `args.kind`."""
    state, kind, saved = read_weights(path)
    if args.kind not in ("auto", kind):
        raise UserError(f"--kind {args.kind}: {path} is of kind {kind}; leave the flag out.")
    return state, kind, saved


def _as_ours(path, args):
    """The checkpoint at `path`, ours or the original's, as one of ours. Raises `UserError` if it does not fit."""
    state, kind, saved = _read(path, args)
    if kind == "convnext":
        flag = "--merge" if args.merge else f"--to {args.to}"
        raise UserError(f"{flag} {path} is an ImageNet ConvNeXt; give trained encoders.")
    if kind == "ours":
        report = Report()
        _compare(state, _targets(saved_recipe(saved)), report)
        saved = {**saved, "model": report.taken}
    else:
        saved, report = convert_unipad(state, args.preset)
    if report.faults:
        print(report)
    _refuse_faults(report, path, args)
    return saved


def _refuse_faults(report, path, args):
    """Raises `UserError` if the file at `path` has faults, unless --no-strict."""
    if args.strict and report.faults:
        first = (report.unfit + report.missing + report.unexpected)[0]
        preset = f"preset {args.preset}" if args.preset else "any recipe"
        raise UserError(
            f"{path} does not fit {preset}: {len(report.missing)} weights are missing, {len(report.unexpected)} "
            f"unexpected, {len(report.unfit)} unfit, such as {first}; --no-strict converts what fits."
        )


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
