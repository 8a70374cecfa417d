"""The kinds of files that the project reads, and a reader for each; for `tests.damage`.

A reader takes a folder with the files of `make_files`, one of which may be damaged, and a link `intact` to an undamaged
copy of them. It reads files as the scripts do, trains no step, and returns a `Readout`.
"""

import contextlib
import gc
import hashlib
import json
import re
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch

import eval as evaluation
import finetune
import train
from unipad import convert
from unipad.batch import CAMERAS, CLASSES, FREE, LIDARSEG_CLASSES
from unipad.config import Data, Grid
from unipad.config_dict import to_dict
from unipad.data.collate import collate
from unipad.data.cutpaste import cut_out, load_objects
from unipad.data.dataset import BadFrame
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import add_occupancy, generate, is_synthetic
from unipad.data.tables import load_camera_sweeps, load_index, load_source_frames
from unipad.evaluate.segmentation import score_segmentation, write_segmentation
from unipad.evaluate.submission import score_submission, write_submission
from unipad.kernels import tuning
from unipad.model.detect import Detections, Detector
from unipad.model.pretrain import Pretrain
from unipad.recipes import DETECT, PRETRAIN
from unipad.runtime import generators

VERSION = "v1.0-mini"
FAR = 1e5  # meters; no real coordinate is larger


@dataclass
class Readout:
    """What a reader returns: digests of what it read, what it skipped, and what is impossible in the result."""

    parts: dict[str, str] = field(default_factory=dict)  # part, such as a frame -> digest
    skipped: dict[str, str] = field(default_factory=dict)  # part -> `path: reason`
    faults: list[str] = field(default_factory=list)

    def add(self, **parts):
        self.parts |= {name: digest(part) for name, part in parts.items()}


def digest(value) -> str:
    """A hash of dataclasses, containers, arrays, tensors and plain values: equal only for equal ones."""
    sha256 = hashlib.sha256()

    def feed(value):
        if is_dataclass(value):
            feed(vars(value))
        elif isinstance(value, dict):
            sha256.update(f"dict {len(value)}".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            sha256.update(f"list {len(value)}".encode())
            for item in value:
                feed(item)
        elif isinstance(value, torch.Tensor | np.ndarray):
            array = np.ascontiguousarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value)
            sha256.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            sha256.update(f"{type(value).__name__} {value!r}".encode())

    feed(value)
    return sha256.hexdigest()


class ReadingDone(BaseException):
    """Raised where a script has read its files and would begin to compute. No Exception, so that nothing catches it."""


def _end_reading(*_, **__):
    raise ReadingDone


def sample_faults(sample) -> list[str]:
    """The conditions that a sample violates, of those that every `unipad.data.dataset.Sample` must meet."""
    conditions = {
        "points are finite and near": np.isfinite(sample.points).all() and (np.abs(sample.points[:, :3]) < FAR).all(),
        "sweeps are not from the future": (sample.points[:, 4] >= 0).all(),
        "sweeps are not a minute old": (sample.points[:, 4] < 60).all(),
        "boxes are finite and near": np.isfinite(sample.boxes).all() and (np.abs(sample.boxes[:, :3]) < FAR).all(),
        "boxes have a size": (sample.boxes[:, 3:6] > 0).all() and (sample.boxes[:, 3:6] < FAR).all(),
        "boxes have classes": len(sample.labels) == len(sample.boxes)
        and np.isin(sample.labels, range(len(CLASSES))).all(),
        "points have labels": sample.point_labels is None
        or len(sample.point_labels) == len(sample.points)
        and (sample.point_labels <= len(LIDARSEG_CLASSES)).all(),
        "matrices are finite": np.isfinite(sample.lidar2image).all() and np.isfinite(sample.lidar2camera).all(),
        "images are RGB": all(i.dtype == np.uint8 and i.ndim == 3 and i.shape[2] == 3 for i in sample.images),
        "features are finite": all(np.isfinite(features).all() for features in sample.features or ()),
    }
    if conditions["matrices are finite"] and len(sample.images):
        rotation = sample.lidar2camera[:, :3, :3].astype(float)
        conditions["camera poses are rigid"] = (
            np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-3)
            and (np.linalg.det(rotation) > 0).all()
        )
        intrinsics = sample.lidar2image.astype(float) @ np.linalg.inv(sample.lidar2camera.astype(float))
        focal = np.diagonal(intrinsics[:, :2, :2], axis1=1, axis2=2)  # [N, 2] along u, v
        conditions["cameras have a focal length"] = (focal > 0).all()
    return [f"violated: {condition}" for condition, holds in conditions.items() if not holds]


def read_city(folder: Path, with_losses: bool = False, data: Data | None = None) -> Readout:
    """All frames of both splits; with_losses: both `models` must have finite losses on them, too."""
    root, readout, grid, data = folder / "city", Readout(), models()[0].recipe.grid, data or Data(sweeps=3)
    readout.add(synthetic=is_synthetic(root))
    samples = []
    for split in ("mini_train", "mini_val"):
        dataset = NuScenesDataset(root, VERSION, split, data)
        # for the models: without points outside their grid
        cropped = NuScenesDataset(root, VERSION, split, data, point_range=(grid.low, grid.high))
        readout.add(**{f"scenes of {split}": dataset.scenes()})
        for i in range(len(dataset)):
            name = f"frame {dataset.index.tokens[dataset.frames[i]].decode()}"
            try:
                sample = dataset[i]
            except BadFrame as bad:
                readout.skipped[name] = str(bad)
                continue
            readout.add(**{name: sample})
            readout.faults += sample_faults(sample)
            cut_out(sample, min_points=5)  # must not raise
            if with_losses:
                samples.append(cropped.read(i, np.random.default_rng(0)))
    if with_losses and samples and not readout.faults:
        batch = collate(samples).to("cpu")
        for net in models():
            with torch.no_grad():
                losses = net(batch, generators(seed=0, step=0, positions=range(len(batch)), device="cpu"))
            losses = losses if isinstance(losses, dict) else losses[0]  # `Pretrain` returns (losses, missed rays)
            if not all(torch.isfinite(loss) for loss in losses.values()):
                readout.faults.append("violated: losses are finite")
    return readout


def read_splits(folder):
    """The splits, and the frames of the custom split `dark` that `make_files` adds."""
    readout, root = Readout(), folder / "city"
    readout.add(splits=NuScenesDataset.splits(root, VERSION), tokens=load_index(root, VERSION, "dark").tokens)
    return readout


def read_camera_sweeps(folder):
    """The cached index of the camera sweeps before each keyframe."""
    readout = Readout()
    readout.add(sweeps=load_camera_sweeps(folder / "city", VERSION, "mini_val"))
    return readout


def read_sources(folder):
    """The cached index of the frames around each keyframe that the photometric loss looks into."""
    readout = Readout()
    readout.add(sources=load_source_frames(folder / "city", VERSION, "mini_val", (-1, 1)))
    return readout


def read_voxels(folder):
    """The occupancy labels of the frames that have them, and the cached index of their files."""
    dataset, readout = NuScenesDataset(folder / "city", VERSION, "mini_val", Data()).with_occupancy(), Readout()
    readout.add(index=dataset.occupancy_index)
    for i in range(len(dataset)):
        name = f"frame {dataset.index.tokens[dataset.frames[i]].decode()}"
        try:
            sample = dataset[i]
        except BadFrame as bad:
            readout.skipped[name] = str(bad)
            continue
        readout.add(**{name: sample.occupancy})
        if sample.occupancy[0].max() > FREE or sample.occupancy[1:].max() > 1:
            readout.faults.append("violated: voxels have classes and masks")
    return readout


def read_objects(folder):
    """Every object for cut-and-paste augmentation, with its points and image crops."""
    dataset, readout = NuScenesDataset(folder / "city", VERSION, "mini_train", Data()), Readout()
    objects = load_objects(dataset, DETECT["lidar"]["lidar-0.075"].paste)
    readout.add(boxes=objects.boxes, labels=objects.labels)
    for k in range(len(objects.labels)):
        pictures = [objects._picture(k, view) for view in range(len(CAMERAS))]
        readout.add(**{f"object {k}": (objects._points(k), pictures)})
    return readout


# Two steps and no validation
FLAGS = ["--device", "cpu", "--workers", "0", "--val-every", "0", "--steps", "2"]


def start_training(script, *flags, **changes):
    """What a script reads before its first step, started with `flags` or, without any, with the arguments of
    `new_run(script)`, changed by `changes`."""
    readout, originals = Readout(), {"resumed": script.resumed, "take_weights": script.take_weights}

    def resumed(saved, parts):
        result = originals["resumed"](saved, parts)
        if saved:
            readout.add(step_and_metrics=result, **{name: part.state_dict() for name, part in parts.items()})
            net = parts["model"]
            readout.faults.extend(_weight_faults(net.state_dict()))
        return result

    def take_weights(net, prefix, paths, flag, print0):
        lines = []
        taken = originals["take_weights"](net, prefix, paths, flag, lines.append)
        # the weights that the files should have; none without files
        state = {name: w for name, w in net.state_dict().items() if name.startswith(prefix) and paths}
        readout.add(**{name: state[name] for name in taken})
        # the first line names the file, the last one the weights that were not in it
        readout.skipped |= {name: lines[0] for name in state.keys() - taken if name in lines[-1]}
        readout.faults.extend(_weight_faults(state))
        return taken

    with (
        mock.patch.multiple(script, resumed=resumed, take_weights=take_weights, step_batches=_end_reading),
        mock.patch("unipad.run_folder.commit", return_value=None),  # `commit` runs git
        contextlib.suppress(ReadingDone),
    ):
        args = script.parse(list(map(str, flags))) if flags else replace(new_run(script), **changes)
        readout.faults += type_faults(type(args), args)
        if args.config:
            readout.add(args=to_dict(replace(args, out=None, config=None)))  # without paths, which differ in each case
        script.main(args)
    return readout


def _weight_faults(state):
    """A fault that names the first weight that is not finite, if there is one."""
    bad = [name for name, w in state.items() if w.is_floating_point() and not torch.isfinite(w).all()]
    return [f"violated: {name} is finite" for name in bad[:1]]


def type_faults(annotation, value, name="") -> list[str]:
    """Faults of a (nested) dataclass: fields whose values do not have the annotated types, or are not finite."""
    if not is_dataclass(annotation):
        is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        options = typing.get_args(annotation) if is_union else (annotation,)
        fits = any(_fits(option, value) for option in options)
        return [] if fits else [f"violated: {name} {value!r} is a {annotation}"]
    faults, hints = [], typing.get_type_hints(annotation)
    for f in fields(annotation):
        part = getattr(value, f.name)
        faults += type_faults(type(part) if is_dataclass(part) else hints[f.name], part, f"{name}.{f.name}")
    return faults


def _fits(annotation, value):
    """Whether `value` has the annotated type, which is no union; numbers must be finite."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        each = args[:1] * len(value) if args[1:] == (...,) and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, each, value))
    if annotation is float:
        return type(value) in (int, float) and np.isfinite(float(value))
    if annotation is type(None):
        return value is None
    return type(value) is annotation or annotation is Path and isinstance(value, Path)


def read_run(folder):
    """Resume a run: checkpoint, log and settings."""
    log = folder / "run/log.jsonl"
    intact_lines = set((folder / "intact/run/log.jsonl").read_bytes().split(b"\n"))
    before = set(log.read_bytes().split(b"\n") if log.is_file() else ())
    readout = start_training(train, "--resume", folder / "run")
    dropped = before - set(log.read_bytes().split(b"\n")) - {b""}
    if dropped & intact_lines:
        readout.faults.append(f"violated: the log keeps its intact lines ({len(dropped & intact_lines)} are dropped)")
    readout.add(dropped_log_lines=sorted(dropped))
    return readout


def read_config(folder):
    """Start a run with the settings of another one (--config)."""
    return start_training(train, "--config", folder / "run/config.json", "--out", folder / "new")


def read_init(folder):
    """Start a run from the weights of another one (--init)."""
    changes = {"data_root": folder / "intact/city", "out": folder / "new"}
    return start_training(train, init=(folder / "run/checkpoints/last.pt",), **changes)


def read_pretrained(folder):
    """Fine-tune from the weights of a pre-training run (--pretrained)."""
    changes = {"data_root": folder / "intact/city", "out": folder / "new"}
    return start_training(finetune, pretrained=(folder / "run",), **changes)


@lru_cache(2)
def new_run(script):
    """The arguments of a run of train.py or finetune.py, with the recipe of `models`."""
    args = script.parse(["--modality", "lidar", "--preset", "tiny", *FLAGS])
    pretrain, detector = models()
    return replace(args, recipe=(detector if script is finetune else pretrain).recipe)


def read_tuning(folder):
    """The choice of a kernel's launch parameters, from a run's tuning.json."""
    readout = Readout()
    with mock.patch.object(train, "step_batches", _end_reading), contextlib.suppress(ReadingDone):
        train.main(train.parse(list(map(str, ["--resume", folder / "run", "--tune"]))))
    candidates = [(16, 4), (32, 8), (64, 8)]  # the file of `make_files` names the second
    readout.add(choice=tuning.choose(("conv", 3, 1000), candidates, lambda candidate: None, torch.device("cpu")))
    tuning.disable()
    return readout


def read_detector(folder):
    """eval.py up to its first frame."""
    readout = Readout()

    def detect(args, model, dataset, *_):
        readout.add(model=model.state_dict(), recipe=to_dict(model.recipe), frames=dataset.contents())
        readout.faults.extend(_weight_faults(model.state_dict()) + type_faults(type(model.recipe), model.recipe))

    with mock.patch.object(evaluation, "detect", detect):
        flags = [folder / "detector.pt", "--device", "cpu", "--workers", "0", "--out", folder / "new"]
        evaluation.main(evaluation.parse(list(map(str, flags))))
    return readout


def read_conversion(folder, name, **flags):
    """Convert the checkpoint `name`."""
    readout = Readout()
    convert.main(convert.Args((folder / name, folder / "converted.pt"), **flags))
    converted = torch.load(folder / "converted.pt", weights_only=True)
    converted.pop("meta", None)  # a note about the origin, which no program reads
    readout.add(converted=converted)
    return readout


def read_submission(folder):
    """Score a file of detections."""
    readout = Readout()
    summary = score_submission(folder / "results_nusc.json", folder / "intact/city", VERSION, "mini_val")
    readout.add(mAP=summary["mean_ap"], NDS=summary["nd_score"])
    if not (0 <= summary["mean_ap"] < 1.001 and 0 <= summary["nd_score"] < 1.001):  # at most 1, up to rounding
        readout.faults.append("violated: scores are from 0 to 1")
    return readout


def read_segments(folder):
    """Score files of predicted point classes."""
    readout = Readout()
    summary = score_segmentation(
        folder / "segments", NuScenesDataset(folder / "intact/city", VERSION, "mini_val", Data())
    )
    readout.add(mIoU=summary["miou"])
    return readout


@dataclass(frozen=True)
class Kind:
    """Files of one kind and their reader."""

    files: str  # glob pattern, relative to the folder of `make_files`
    read: Callable[[Path], Readout]
    format: str = ""  # json, json lines or checkpoint: key of `tests.damage.SPECIAL`; "": any other
    # the file has a checksum or can be computed again: another result without a message is a fault
    checked: bool = False
    weight: int = 1  # number of cases, relative to other kinds


KINDS = {
    "tables": Kind("city/v1.0-mini/*.json", partial(read_city, with_losses=True), "json", weight=6),
    "splits": Kind("city/v1.0-mini/splits.json", read_splits, "json"),
    "LiDAR keyframe": Kind("city/samples/LIDAR_TOP/*", partial(read_city, with_losses=True), weight=2),
    "LiDAR sweep": Kind("city/sweeps/LIDAR_TOP/*", read_city),
    "image": Kind("city/samples/CAM_FRONT*/*", read_city, weight=2),
    "PNG": Kind("city/samples/CAM_BACK/*", read_city, checked=True),  # a PNG has checksums
    "features": Kind("city/features/samples/*/*", partial(read_city, data=Data(features=Path("features")))),
    "point labels": Kind("city/lidarseg/*/*.bin", read_city),
    "map": Kind("city/maps/*.png", read_city),
    "index": Kind("city/unipad-index/*mini_train.npz", read_city, checked=True),
    "camera sweeps": Kind("city/unipad-index/*mini_val-camera-sweeps.npz", read_camera_sweeps, checked=True),
    "sources": Kind("city/unipad-index/*mini_val-sources-1+1.npz", read_sources, checked=True),
    "occupancy labels": Kind("city/gts/scene-0103/*/labels.npz", read_voxels, checked=True),
    "occupancy index": Kind("city/unipad-index/*mini_val-occupancy.npz", read_voxels, checked=True),
    "objects": Kind("city/unipad-index/*-objects-*", read_objects, checked=True, weight=2),
    # checkpoints, by what a user does with them
    "resumed": Kind("run/checkpoints/last.pt", read_run, "checkpoint", checked=True, weight=2),
    "init": Kind("run/checkpoints/last.pt", read_init, "checkpoint", checked=True),
    "pretrained": Kind("run/checkpoints/last.pt", read_pretrained, "checkpoint", checked=True),
    "evaluated": Kind("detector.pt", read_detector, "checkpoint", checked=True),
    "converted": Kind("detector.pt", partial(read_conversion, name="detector.pt"), "checkpoint", checked=True),
    "original": Kind(  # with the key names of the original UniPAD
        "original.pth", partial(read_conversion, name="original.pth", preset="tiny"), "checkpoint", checked=True
    ),
    "config": Kind("run/config.json", read_config, "json", weight=2),
    "log": Kind("run/log.jsonl", read_run, "json lines"),
    "tuning": Kind("run/tuning.json", read_tuning, "json"),
    "submission": Kind("results_nusc.json", read_submission, "json"),
    "segments": Kind("segments/lidarseg/*/*.bin", read_segments),
}


@lru_cache(1)
def models():
    """(pre-training model, detector), as small as possible: they only have to run without an error."""
    torch.manual_seed(0)
    grid = Grid(low=(-40.0, -40.0, -3.0), high=(40.0, 40.0, 9.0), cell=(2.5, 2.5, 3.0))
    narrow = {"widths": (8, 8), "sparse_channels": 8, "neck_widths": (8,), "neck_strides": (1,), "channels": 8}
    pretrain, detect = (
        replace(recipe, grid=grid, lidar=replace(recipe.lidar, cell=(1.25, 1.25, 1.5), **narrow))
        for recipe in (PRETRAIN["lidar"]["tiny"], DETECT["lidar"]["tiny"])
    )
    render = replace(pretrain.render, samples=8, importance=4, channels=8)
    pretrain = replace(pretrain, rays=replace(pretrain.rays, per_view=8, lidar_per_view=8), render=render)
    detect = replace(detect, detect=replace(detect.detect, layers=1, hidden=16))
    return Pretrain(pretrain).train(), Detector(detect).train()


def warm_up():
    """Import and build what every reader needs, so that forked children need not."""
    import nuscenes.eval.detection.evaluate  # noqa: F401
    import nuscenes.eval.lidarseg.evaluate  # noqa: F401

    models()
    for script in (train, finetune):
        new_run(script)
    gc.collect()
    gc.freeze()  # otherwise the first garbage collection in a child would copy every page of memory


def make_files(folder: Path, city: Path | None):
    """Write intact files of all kinds. city: root of a synthetic dataset to copy; None: generate one."""
    root = folder / "city"
    if city:
        shutil.copytree(city, root, ignore=shutil.ignore_patterns("unipad-index"))
    else:
        sizes = dict(image_size=(72, 128), columns=90, sweeps=2, features=4)
        generate(root, scenes=2, keyframes=3, workers=1, progress=False, **sizes)
    (root / VERSION / "splits.json").write_text('{"dark": ["scene-0103"]}')
    for image in root.glob("samples/CAM_BACK/*.jpg"):  # one camera has PNG images
        cv2.imwrite(str(image.with_suffix(".png")), cv2.imread(str(image)))
        image.unlink()
    table = root / VERSION / "sample_data.json"
    table.write_text(re.sub(r"(samples/CAM_BACK/[^\"]*)\.jpg", r"\1.png", table.read_text()))
    train_set, val_set = (NuScenesDataset(root, VERSION, split, Data()) for split in ("mini_train", "mini_val"))
    add_occupancy(root, workers=1)
    val_set.with_occupancy()  # this and the next three write their caches
    load_camera_sweeps(root, VERSION, "mini_val")
    load_source_frames(root, VERSION, "mini_val", (-1, 1))
    load_objects(train_set, DETECT["lidar"]["lidar-0.075"].paste)

    run = folder / "run"
    train.main(replace(new_run(train), data_root=root, out=run, stop_at=1))
    (run / "tuning.json").write_text(
        json.dumps({"cpu": {"conv 3 1024": [32, 8]}, "NVIDIA H200": {"conv 3 8": [64, 8]}})
    )

    detector = models()[1]
    args = to_dict(replace(new_run(finetune), data_root=root, version=VERSION, recipe=None))
    config = {"args": args, "recipe": to_dict(detector.recipe), "steps": 1}
    saved = {"model": detector.state_dict(), "step": 1, "metrics": {}, "config": config}
    torch.save(saved, folder / "detector.pt")
    tiny = Detector(DETECT["lidar"]["tiny"])
    saved = {"model": tiny.state_dict(), "config": config | {"recipe": to_dict(tiny.recipe)}}
    torch.save(convert.convert_ours(saved)[0], folder / "original.pth")

    detections, segments = {}, {}  # the ground truth
    for i in range(len(val_set)):
        sample = val_set[i]
        scores = torch.linspace(1, 0.5, len(sample.boxes))
        detections[sample.token] = Detections(torch.from_numpy(sample.boxes), scores, torch.from_numpy(sample.labels))
        segments[sample.token] = torch.from_numpy(sample.point_labels.clip(1, 16))  # class 0 must not be predicted
    write_submission(detections, val_set.index, folder / "results_nusc.json", use_camera=False, use_lidar=True)
    write_segmentation(segments, val_set, folder / "segments")
