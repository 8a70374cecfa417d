"""Evaluate a model, with pictures of its predictions.

    python eval.py RUN                                  # NDS and mAP of boxes, or mIoU of points or voxels; for a
                                                        # pre-trained model PSNR, depth errors, distance of features
                                                        # and IoU of carved occupancy, if it was trained for them
    python eval.py RUN --tta                            # test-time augmentation: twelve scaled and flipped copies of
                                                        # every frame for boxes, eight rotated and flipped for points
    python eval.py RUN --version v1.0-test --split test --data-root /data/nuscenes       # a submission
    python eval.py RUN --frames 0 5 --mesh              # render two frames, with their surfaces
    python eval.py RUN --scene scene-0103               # render a whole scene, as a GIF
    python eval.py RUN --detect.min-score 0.1           # change a setting of its recipe: RUN --help lists them
    torchrun --nproc-per-node 8 eval.py RUN

RUN is the folder of a run of finetune.py or train.py, or a checkpoint, and comes first. Results are in RUN/eval.
"""

import json
import os
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

# Idle OpenMP threads spin less. Must be set before torch loads OpenMP; see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from unipad.exit import end_at_once, exit_on_user_error

if __name__ == "__main__":
    end_at_once()  # on Ctrl-C during the imports

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from unipad import cli
from unipad.batch import CLASSES, LIDARSEG_CLASSES, OCCUPANCY_CLASSES
from unipad.checkpoint import load_weights, read_run
from unipad.config import (
    CameraConfig,
    Data,
    Detect,
    DetectRecipe,
    LidarConfig,
    Occupancy,
    OccupancyRecipe,
    Render,
    Segment,
    SegmentRecipe,
    UnetConfig,
)
from unipad.data.collate import collate
from unipad.data.dataset import DEFAULT_DATASET, BadFrame, check_recorded, dataset_class
from unipad.data.loader import held_out_batches
from unipad.draw.boxes import detection_views
from unipad.draw.mesh import check_mesh, distances, surface, write_ply
from unipad.draw.occupancy import occupancy_views
from unipad.draw.segments import segment_views
from unipad.draw.views import rendered_views, write_video
from unipad.errors import UserError, check_ranges
from unipad.evaluate.detection import detect_all, write_detections
from unipad.evaluate.occupancy import count_all, occupancy_table, summarize
from unipad.evaluate.rendering import evaluate_rendering
from unipad.evaluate.segmentation import (
    score_segmentation,
    segment_all,
    segmentation_table,
    write_segmentation,
)
from unipad.evaluate.submission import score_submission, table
from unipad.evaluate.tta import detect_tta, make_transforms, segment_tta
from unipad.model.detect import Detector
from unipad.model.occupancy import OccupancyModel
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.run_folder import lock_folder
from unipad.runtime import gather_to_main, generators, mixed_precision, on_main, start


@dataclass(frozen=True)
class Settings:
    """The parts of a recipe that evaluation reads; None where the recipe lacks them."""

    data: Data
    camera: CameraConfig | None = None
    lidar: LidarConfig | UnetConfig | None = None
    render: Render | None = None
    detect: Detect | None = None
    segment: Segment | None = None
    occupancy: Occupancy | None = None


@dataclass(frozen=True)
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # folder of a run, or a checkpoint
    # what to evaluate; None: what it was trained for
    task: Literal["detect", "segment", "occupancy", "render"] | None = None
    split: str = "val"  # train, val or test; for v1.0-mini, train and val mean mini_train and mini_val
    data_root: Path | None = None  # folder of the dataset; None: that of the run, or a synthetic city
    version: str | None = None  # version of the dataset; None: the run's
    dataset: str | None = None  # package.module:Class of the dataset; None: the run's, if it is in unipad.data
    out: Path | None = None  # folder of the results, whose files are overwritten; None: eval/ in the run's folder
    batch_size: int = 1  # samples per batch and process
    workers: int | None = None  # data loading processes per process; None: up to 4 with a GPU, 1 without
    precision: Literal["bf16", "fp16", "fp32"] | None = None  # of the encoder; None: bf16 or fp16 on a GPU, else fp32
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    deterministic: bool = False  # bitwise reproducible results on a GPU too, with slower kernels
    pictures: int = 4  # frames to render (render) or draw (other tasks), spread over the split
    min_score: float = 0.3  # detect: draw boxes with at least this score, 0 to 1
    tta: bool = False  # detect, segment: test-time augmentation; merge predictions for transformed copies of each frame
    tta_scales: tuple[float, ...] | None = None  # --tta: scale factors; None: 1 1.06 0.96 (segment: 1)
    tta_angles: tuple[float, ...] | None = None  # --tta: degrees about the vertical axis; None: 0 (segment: 0 90)
    tta_flips: bool = True  # --tta: also flip front to back, left to right, and both
    frames: tuple[int, ...] = ()  # render: numbers of frames in the split, from 0; if none: as many as --pictures says
    scene: str | None = None  # render: all frames of this scene, and a video of them
    video: Literal["gif", "mp4"] = "gif"  # render: format of the video
    video_fps: float = 4.0  # render: frames per second of the video; keyframes are half a second apart
    picture_stride: int = 1  # render: spacing of the rays, pixels
    masked: bool = True  # render: mask the encoder's input as in training
    seed: int = 0  # seed of the masks
    mesh: bool = False  # render: write the surface of each frame as a PLY file
    mesh_cell: float = 0.4  # render: spacing of the points where --mesh samples the signed distance, meters
    recipe: Annotated[Settings | None, tyro.conf.arg(name="")] = None  # the settings of the run, as changed by flags


# Flags that only some tasks have
TASK_FLAGS = {
    "detect": ("tta", "tta_scales", "tta_angles", "tta_flips", "min_score", "batch_size"),
    "segment": ("tta", "tta_scales", "tta_angles", "tta_flips", "batch_size"),
    "occupancy": ("batch_size",),
    "render": ("frames", "scene", "video", "video_fps", "picture_stride", "masked", "mesh", "mesh_cell"),
}
# Flags that have no effect without another one
NEEDS = {
    "tta_scales": "tta",
    "tta_angles": "tta",
    "tta_flips": "tta",
    "video": "scene",
    "video_fps": "scene",
    "mesh_cell": "mesh",
}
TASKS = {"detect": Detector, "segment": Segmenter, "occupancy": OccupancyModel, "render": Pretrain}
# Default scales and angles (degrees) of --tta. Both flips together rotate by 180 degrees: with them, 0 and 90 cover 180
# and 270 too
TTA = {"detect": ((1.0, 1.06, 0.96), (0.0,)), "segment": ((1.0,), (0.0, 90.0))}


def parse(argv=None) -> Args:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([], ["-h"], ["--help"]):  # no checkpoint, so no recipe
        return tyro.cli(Args, args=argv, description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    args = cli.parse(Args, with_settings, __doc__, argv)
    positive = ("batch_size", "pictures", "video_fps", "picture_stride", "mesh_cell")
    check_ranges(args, above_0=positive, not_below_0=("workers", "seed", "min_score"))
    cli.check_recipe(args.recipe)
    if () in (args.tta_scales, args.tta_angles) or not all(0.1 <= s <= 10 for s in args.tta_scales or ()):
        raise UserError("--tta-scales must be from 0.1 to 10, and it and --tta-angles need at least one value each.")
    if not 0.1 <= args.video_fps <= 100:
        raise UserError(f"--video-fps {args.video_fps} must be from 0.1 to 100.")
    if args.min_score > 1:
        raise UserError(f"--min-score {args.min_score} must be from 0 to 1.")
    for flag, other in NEEDS.items():
        if getattr(args, flag) != Args.__dataclass_fields__[flag].default and not getattr(args, other):
            raise UserError(f"--{flag.replace('_', '-')} has no effect without --{other}; add it, or drop this flag.")
    if args.frames and args.scene:
        raise UserError("--frames and --scene both choose frames; drop one of them.")
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out} is a file; give a folder.")
    return args


def with_settings(args):
    """The flags, with the field `recipe` set to the checkpoint's settings."""
    _, recipe, _ = read_run(args.checkpoint, lazily=True)
    known = {field.name: getattr(recipe, field.name, None) for field in fields(Settings)}
    return replace(args, recipe=Settings(**known))


def main(args: Args):
    with start(args.device, args.deterministic) as world:
        print0 = world.print0
        saved, recipe, run = read_run(args.checkpoint)
        recipe = replace(recipe, **{name: part for name, part in vars(args.recipe).items() if part is not None})
        task = task_of(args, recipe)
        train_args = saved["config"]["args"]
        dataset_name = args.dataset or train_args.get("dataset", DEFAULT_DATASET)
        if args.dataset is None:
            check_recorded(dataset_name, args.checkpoint)
        dataset_type = dataset_class(dataset_name)
        if task != "render" and task not in dataset_type.tasks:
            raise UserError(f"--dataset {dataset_name} does not support --task {task}; see unipad/data/dataset.py.")
        version = args.version or train_args.get("version", dataset_type.default_version)
        with world.main_first():  # the main process may generate the city and build the index
            root = Path(
                os.path.expanduser(
                    args.data_root or train_args.get("data_root") or dataset_type.default_root(recipe.data)
                )
            )
            split = dataset_type.splits(root, version).get(args.split, args.split)
            # None keeps all points: --tta may move those outside the grid into it, and segmentation classifies them too
            point_range = None if args.tta or task == "segment" else (recipe.grid.low, recipe.grid.high)
            data = dataset_type.data_to_evaluate(root, version, split, recipe.data)
            dataset = dataset_type(root, version, split, data, point_range=point_range)
            if task == "occupancy":
                dataset = dataset.with_occupancy(labels=split != "test")
            dataset = dataset.with_points_beyond() if recipe.reads_points_beyond else dataset

        model = TASKS[task](recipe).to(world.device).eval()
        load_weights(model, saved["model"], args.checkpoint)
        out = args.out or run / "eval"
        lock_folder(out, world)
        print0(f"{args.checkpoint}, step {saved['step']}: {task} on {len(dataset)} frames of {split}, {world.device}")
        autocast, _ = mixed_precision(args.precision, world.device)
        with autocast:
            evaluate = {"detect": detect, "segment": segment, "occupancy": occupancy, "render": render}[task]
            evaluate(args, model, dataset, out, world)
        print0(f"results      {out}")


def detect(args, model, dataset, out, world):
    """Detect boxes in the whole split: write the submission and pictures, and print the devkit's metrics."""
    predict = model.detect
    if args.tta:
        predict = partial(detect_tta, model.detect, tta_transforms(args, "detect"))
    detections = detect_all(model, dataset, world, predict, args.batch_size, world.workers(args.workers))
    if not world.is_main:
        return
    file = write_detections(detections, model.recipe, dataset, out)
    if dataset.split == "test":
        world.print0(f"the test split has no public annotations: no metrics, but a submission in {file}")
    else:
        world.print0(table(score_submission(file, dataset.root, dataset.version, dataset.split)))
    for i, batch in drawn_frames(args, model, dataset, detections):
        picture = detection_views(batch, detections[batch.tokens[0]], args.min_score)
        Image.fromarray(picture).save(out / f"boxes_{i}.png")


def segment(args, model, dataset, out, world):
    """Classify every point of the split: write the submission and pictures, and print the devkit's metrics."""
    if dataset.split != "test":
        dataset.require_point_labels()
    predict = model.segment
    if args.tta:
        predict = partial(segment_tta, model.logits, tta_transforms(args, "segment"))
    predictions = segment_all(model, dataset, world, predict, args.batch_size, world.workers(args.workers))
    if not world.is_main:
        return
    write_segmentation(predictions, dataset, out)
    if dataset.split == "test":
        world.print0(f"the test split has no public labels: no metrics, but a submission in {out}")
    else:
        world.print0(segmentation_table(score_segmentation(out, dataset, predictions)))
    for i, batch in drawn_frames(args, model, dataset, predictions):
        picture = segment_views(batch, predictions[batch.tokens[0]])
        Image.fromarray(picture).save(out / f"segments_{i}.png")


def occupancy(args, model, dataset, out, world):
    """Predict the voxels of the whole split: write the submission and pictures, and print mIoU and RayIoU."""
    folder, scored, workers = out / "occupancy", dataset.split != "test", world.workers(args.workers)
    counts = count_all(model, dataset, world, args.batch_size, workers, folder, rays=scored)
    if not world.is_main:
        return
    if scored:
        world.print0(occupancy_table(summarize(counts.values(), out)))
    else:
        world.print0(f"the test split has no public labels: no metrics, but a submission in {folder}")
    # which frames lack labels has been reported
    labeled = partial(type(dataset).with_occupancy, labels=scored, verbose=False)
    for i, batch in drawn_frames(args, model, dataset, counts, labeled):
        predicted = np.load(folder / f"{batch.tokens[0]}.npz")["arr_0"]
        Image.fromarray(occupancy_views(batch, torch.from_numpy(predicted))).save(out / f"occupancy_{i}.png")


def drawn_frames(args, model, dataset, predictions, labeled=lambda dataset: dataset):
    """Yield (index of the picture, batch of one) for the frames to draw: with images, even for a LiDAR model.

    labeled: dataset -> the dataset with the task's labels.
    """
    with_images = dataset.has_images(dataset.root, dataset.version, dataset.split)
    settings = replace(model.recipe.data, cameras=with_images, camera_sweeps=1)  # only the keyframe's images
    drawn = labeled(type(dataset)(dataset.root, dataset.version, dataset.split, settings))
    for i, (_, batch) in enumerate(held_out_batches(drawn, args.pictures)):
        if batch.tokens[0] in predictions:  # absent where the model's own dataset lacks the frame or cannot read it
            yield i, batch.to("cpu")


def tta_transforms(args, task):
    """The transforms of --tta, [4, 4] each."""
    given = args.tta_scales, args.tta_angles
    scales, angles = (values or default for values, default in zip(given, TTA[task], strict=True))
    return make_transforms(scales, np.radians(angles), args.tta_flips)


def render(args, model, dataset, out, world):
    """Render color, depth and normals of some frames: write pictures, next to images and LiDAR points, and metrics."""
    if args.mesh and not model.recipe.render.renders:
        raise UserError("--mesh needs a run that learned to render; this one only learned occupancy: leave --mesh out.")
    if args.mesh:
        check_mesh(model.recipe.grid, args.mesh_cell)
    device, index_of, done = world.device, frames_to_render(args, dataset, world), []
    mine = list(index_of)[world.rank :: world.size]  # numbers of the frames that this process renders
    for number in tqdm(mine, "rendering", disable=None if world.is_main else True, leave=False):
        try:
            batch = collate([dataset[index_of[number]]]).to(device)
        except BadFrame as bad:
            print(f"skipped {bad}", file=sys.stderr)
            continue
        # two sets in the same state, since each use advances one: picture and mesh have the same masks
        mask_generators = [generators(args.seed, 0, [number], device) if args.masked else None for _ in range(2)]
        width = max(240, min(480, batch.images.shape[-1]))  # pixels of a view in the picture
        picture = rendered_views(model, batch, mask_generators[0], args.picture_stride, normals=True, width=width)
        Image.fromarray(picture).save(out / f"frame_{number:05d}.png")
        if args.mesh:
            volume, _ = model.encode(batch, mask_generators[1])
            values = distances(model, volume, args.mesh_cell).cpu().numpy()
            write_ply(out / f"mesh_{number:05d}.ply", *surface(values, model.recipe.grid.low, args.mesh_cell))
        done.append(number)
    done_by = gather_to_main(done, world)  # in the main process: a list for each process

    def check_any_rendered():
        if not any(done_by):
            raise UserError("none of these frames can be read; the files at fault are named above.")

    on_main(check_any_rendered, world)
    batches = ((number, collate([dataset[index_of[number]]])) for number in done)
    metrics = evaluate_rendering(model, batches, args.seed, device, args.masked)
    world.print0("\n".join(f"{name:<20}{value:>10.3f}" for name, value in metrics.items()))
    if world.is_main:
        (out / "render.json").write_text(json.dumps({"frames": sorted(sum(done_by, [])), **metrics}, indent=2) + "\n")
        if args.scene:
            pictures = [out / f"frame_{number:05d}.png" for number in sorted(sum(done_by, []))]
            write_video(pictures, out / f"{args.scene}.{args.video}", args.video_fps)


def frames_to_render(args, dataset, world):
    """The frames to render: {number in the split: index in the dataset, which skips frames with missing files}."""
    # the frame at an index of the dataset is number numbers[index] of the `count` frames of the split
    numbers, count = dataset.frames.tolist(), dataset.frame_count
    if args.scene:
        scenes = dataset.scenes()
        if args.scene not in scenes:
            known = ", ".join(list(scenes)[:5])
            raise UserError(f"--scene {args.scene} is not in {dataset.split}; its scenes include {known}.")
        return {numbers[index]: index for index in scenes[args.scene]}
    outside = [number for number in args.frames if not 0 <= number < count]
    if outside:
        raise UserError(f"--frames {outside[0]} is not in {dataset.split}, which has frames 0 to {count - 1}.")
    for number in set(args.frames) - set(numbers) if world.is_main else ():
        print(f"skipped frame {number}: one of its files is missing", file=sys.stderr)
    pictures = min(args.pictures, len(numbers))
    chosen = args.frames or [numbers[i * len(numbers) // pictures] for i in range(pictures)]
    return {number: numbers.index(number) for number in chosen if number in numbers}


def task_of(args, recipe):
    """What the checkpoint was trained for. Raises `UserError` if another task, or another task's flag, is given, and
    for a number of classes that is not that of nuScenes."""
    tasks = {DetectRecipe: "detect", SegmentRecipe: "segment", OccupancyRecipe: "occupancy"}
    trained_for = tasks.get(type(recipe), "render")
    made_by = {"detect": "finetune.py", "render": "train.py"}
    made_by |= {task: f"finetune.py --task {task}" for task in ("segment", "occupancy")}
    origin = f"{args.checkpoint} is from {made_by[trained_for]}."
    if args.task not in (None, trained_for):
        raise UserError(f"--task {args.task} needs a run of {made_by[args.task]}, and {origin}")
    for task, flag in [
        (task, flag) for task, flags in TASK_FLAGS.items() for flag in flags if flag not in TASK_FLAGS[trained_for]
    ]:
        if getattr(args, flag) != Args.__dataclass_fields__[flag].default:
            flag = "--" + flag.replace("_", "-")
            raise UserError(f"{flag} needs a run of {made_by[task]}, and {origin}")
    expected = {"detect": CLASSES, "segment": LIDARSEG_CLASSES, "occupancy": OCCUPANCY_CLASSES}
    expected = len(expected.get(trained_for, ()))
    if expected and (classes := getattr(recipe, trained_for).classes) != expected:
        raise UserError(
            f"{args.checkpoint} has {classes} classes, but nuScenes has {expected}; "
            f"fine-tune with a recipe that has {expected}."
        )
    return trained_for


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse())
