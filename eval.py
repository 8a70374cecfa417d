"""Judge a model, and look at what it sees.

    python eval.py RUN                                  # NDS and mAP of boxes, mIoU of points; or what a pre-trained
                                                        # model renders. Pictures of each
    python eval.py RUN --tta                            # boxes out of twelve looks at every frame, points out of eight
    python eval.py RUN --version v1.0-test --split test --data-root /data/nuscenes       # a submission
    python eval.py RUN --frames 0 5 --mesh              # renderings of two frames, and their surfaces
    python eval.py RUN --scene scene-0103               # renderings of a whole scene, as a GIF
    torchrun --nproc-per-node 8 eval.py RUN

RUN is the folder of a run of finetune.py or train.py, or a checkpoint. What comes out lies in RUN/eval.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

# Before torch loads OpenMP; see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from unipad.checkpoint import read_run
from unipad.config import DetectRecipe, SegmentRecipe
from unipad.data.dataset import BadFrame, collate
from unipad.data.loader import held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import city_once
from unipad.data.tables import CLASSES, LIDARSEG_CLASSES, scene_tokens
from unipad.draw.boxes import detection_views
from unipad.draw.mesh import check_mesh, distances, surface, write_ply
from unipad.draw.segments import segment_views
from unipad.draw.views import rendered_views, write_film
from unipad.errors import UserError, check_choices, check_ranges
from unipad.evaluate.detection import detect_all, submit
from unipad.evaluate.rendering import evaluate_rendering
from unipad.evaluate.segmentation import (
    score_segmentation,
    segment_all,
    segmentation_table,
    write_segmentation,
)
from unipad.evaluate.submission import score_submission, table
from unipad.evaluate.tta import detect_tta, looks, segment_in_looks
from unipad.model.detect import Detector
from unipad.model.pretrain import Pretrain
from unipad.model.segment import Segmenter
from unipad.runtime import PRECISIONS, exit_on_user_error, generators, mixed_precision, start, to_main


@dataclass(frozen=True)
class Args:
    checkpoint: Annotated[Path, tyro.conf.Positional]  # folder of a run, or a checkpoint
    task: str | None = None  # detect, segment or render (default: what the model was trained for)
    split: str = "val"  # train, val or test; of v1.0-mini, mini_train and mini_val
    data_root: Path | None = None  # folder of a nuScenes set (default: the run's, or a synthetic city)
    version: str | None = None  # version of the set (default: the run's, or v1.0-mini)
    out: Path | None = None  # folder for the results, over those in it (default: eval in the run's folder)
    batch_size: int = 1  # samples that a process looks at together
    workers: int | None = None  # data loading processes of each process (default: 4 with a GPU, 1 without)
    precision: str | None = None  # bf16, fp16 or fp32, of the encoder (default: bf16 or fp16 with a GPU, fp32 without)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    deterministic: bool = False  # bit-equal results on a GPU too, by slower kernels
    pictures: int = 4  # frames that are drawn (detect, segment), or rendered (render), spread over the split
    min_score: float = 0.3  # score from which on a box is drawn, 0 to 1
    tta: bool = False  # detect, segment: look several times at each frame, and merge what is found
    tta_scales: tuple[float, ...] | None = None  # factors of all lengths, for --tta (default: 1 1.06 0.96; segment: 1)
    tta_angles: tuple[float, ...] | None = None  # degrees about the vertical, for --tta (default: 0; segment: 0 90)
    tta_flips: bool = True  # mirror front and back, left and right and both, for --tta
    frames: tuple[int, ...] = ()  # render: these frames of the split, counted from 0 (default: --pictures of them)
    scene: str | None = None  # render: all frames of this scene, and a film of them
    film: str = "gif"  # of a scene: gif or mp4
    film_rate: float = 4.0  # frames a second of the film; keyframes are half a second apart
    picture_stride: int = 1  # pixels between rendered rays
    masked: bool = True  # render: hide from the encoder what training hides
    seed: int = 0  # of what is hidden
    mesh: bool = False  # render: the surface of each frame as a PLY file
    mesh_cell: float = 0.4  # meters between the points where --mesh reads the signed distance


# flags that a task has, of those that not all have
TASK_FLAGS = {
    "detect": ("tta", "tta_scales", "tta_angles", "tta_flips", "min_score", "batch_size"),
    "segment": ("tta", "tta_scales", "tta_angles", "tta_flips", "batch_size"),
    "render": ("frames", "scene", "film", "film_rate", "picture_stride", "masked", "mesh", "mesh_cell"),
}
TASKS = {"detect": Detector, "segment": Segmenter, "render": Pretrain}
# Factors and degrees, for --tta; mirrored twice, a scene is turned by 180 degrees
LOOKS = {"detect": ((1.0, 1.06, 0.96), (0.0,)), "segment": ((1.0,), (0.0, 90.0))}


def main(args: Args):
    check(args)
    with start(args.device, args.deterministic) as world:
        say = partial(print, flush=True) if world.is_main else lambda *_: None
        saved, recipe, run = read_run(args.checkpoint)
        task = task_of(args, recipe)
        trained = saved["config"]["args"]
        version = args.version or trained.get("version", "v1.0-mini")
        mini = version.endswith("-mini") and args.split in ("train", "val")
        split = f"mini_{args.split}" if mini else args.split
        with world.main_first():  # the first to come makes the city and builds the index
            root = args.data_root or trained.get("data_root") or city_once(recipe.data.camera_sweeps - 1)
            # a look may move points into the grid; a segmentation has a class for those outside too
            box = None if args.tta or task == "segment" else (recipe.grid.low, recipe.grid.high)
            dataset = NuScenesDataset(root, version, split, recipe.data, point_range=box)

        model = TASKS[task](recipe).to(world.device).eval()
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:
            what = str(error).splitlines()[1].strip()
            raise UserError(f"the weights of {args.checkpoint} do not fit its own recipe: {what}") from None
        out = args.out or run / "eval"
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
        say(f"{args.checkpoint}, step {saved['step']}: {task} in {len(dataset)} frames of {split}, {world.device}")
        autocast, _ = mixed_precision(args.precision, world.device)
        with autocast:
            {"detect": detect, "segment": segment, "render": render}[task](args, model, dataset, out, world, say)
        say(f"results      {out}")


def detect(args, model, dataset, out, world, say):
    """Boxes of the whole split: the submission, the devkit's metrics, and pictures."""
    function = model.detect
    if args.tta:
        function = partial(detect_tta, model.detect, looks_of(args, "detect"))
    found = detect_all(model, dataset, world, function, args.batch_size, workers_of(args, world))
    if not world.is_main:
        return
    file = submit(found, model.recipe, dataset, out)
    if dataset.split == "test":
        say(f"the test split has no public annotations: no metrics, but a submission in {file}")
    else:
        say(table(score_submission(file, dataset.root, dataset.version, dataset.split)))
    for i, batch in drawn_frames(args, model, dataset, found):
        picture = detection_views(batch, found[batch.tokens[0]], args.min_score)
        Image.fromarray(picture).save(out / f"boxes_{i}.png")


def segment(args, model, dataset, out, world, say):
    """A class for every point of the split: the submission, the devkit's metrics, and pictures."""
    if dataset.split != "test":
        dataset.require_point_labels()
    function = model.segment
    if args.tta:
        function = partial(segment_in_looks, model.logits, looks_of(args, "segment"))
    found = segment_all(model, dataset, world, function, args.batch_size, workers_of(args, world))
    if not world.is_main:
        return
    write_segmentation(found, dataset, out)
    if len(found) < len(dataset):
        say(f"incomplete: {len(dataset) - len(found)} of {len(dataset)} frames could not be read and have no file")
    if dataset.split == "test":
        say(f"the test split has no public labels: no metrics, but a submission in {out}")
    else:
        say(segmentation_table(score_segmentation(out, dataset, found)))
    for i, batch in drawn_frames(args, model, dataset, found):
        picture = segment_views(batch, found[batch.tokens[0]])
        Image.fromarray(picture).save(out / f"segments_{i}.png")


def drawn_frames(args, model, dataset, found):
    """Yield (number, batch of one) for the frames that are drawn: with images too what the LiDAR alone has found."""
    with_images = NuScenesDataset.has_images(dataset.root, dataset.version, dataset.split)
    settings = replace(model.recipe.data, cameras=with_images, camera_sweeps=1)  # of images, the keyframe's
    drawn = NuScenesDataset(dataset.root, dataset.version, dataset.split, settings)
    for i, (_, batch) in enumerate(held_out_batches(drawn, args.pictures)):
        if batch.tokens[0] in found:
            yield i, batch


def looks_of(args, task):
    """The motions of --tta."""
    given = args.tta_scales, args.tta_angles
    scales, angles = (own or usual for own, usual in zip(given, LOOKS[task], strict=True))
    return looks(scales, np.radians(angles), args.tta_flips)


def workers_of(args, world):
    return args.workers if args.workers is not None else (4 if world.device.type == "cuda" else 1)


def render(args, model, dataset, out, world, say):
    """Color, depth and normals of some frames beside their images and LiDAR points, and how far off they are."""
    if args.mesh:
        check_mesh(model.recipe.grid, args.mesh_cell)
    device, rows, done = world.device, rows_of(args, dataset), []
    for row in tqdm(rows[world.rank :: world.size], "rendering", disable=None if world.is_main else True, leave=False):
        try:
            batch = collate([dataset[row]]).to(device)
        except BadFrame as bad:
            print(f"skipped {bad}", file=sys.stderr)
            continue
        hidden = [generators(args.seed, 0, [row], device) if args.masked else None for _ in range(2)]
        width = max(240, min(480, batch.images.shape[-1]))
        picture = rendered_views(model, batch, hidden[0], args.picture_stride, normals=True, width=width)
        Image.fromarray(picture).save(out / f"frame_{row:05d}.png")
        if args.mesh:
            volume, _ = model.encode(batch, hidden[1])
            values = distances(model, volume, args.mesh_cell).cpu().numpy()
            write_ply(out / f"mesh_{row:05d}.ply", *surface(values, model.recipe.grid.low, args.mesh_cell))
        done.append(row)
    if (parts := to_main(done, world)) is not None and not any(parts):
        raise UserError(f"none of the {len(rows)} frames can be read; the files that are wrong are named above.")
    batches = ((row, collate([dataset[row]])) for row in done)
    metrics = evaluate_rendering(model, batches, args.seed, device, args.masked)
    say("\n".join(f"{name:<20}{value:>10.3f}" for name, value in metrics.items()))
    if world.is_main:
        (out / "render.json").write_text(json.dumps({"frames": sorted(sum(parts, [])), **metrics}, indent=2) + "\n")
        if args.scene:
            pictures = [out / f"frame_{row:05d}.png" for row in sorted(sum(parts, []))]
            write_film(pictures, out / f"{args.scene}.{args.film}", args.film_rate)


def rows_of(args, dataset):
    """The frames to render, as rows of the dataset."""
    count = len(dataset)
    if args.scene:
        scenes = scene_tokens(dataset.root, dataset.version)
        row_of = {token.decode(): row for row, token in enumerate(dataset.index.tokens)}
        of_scene = {name: [row_of[t] for t in tokens if t in row_of] for name, tokens in scenes.items()}
        if not of_scene.get(args.scene):
            known = ", ".join([name for name, rows in of_scene.items() if rows][:5])
            raise UserError(f"--scene {args.scene} is not in {dataset.split}; scenes there are {known}.")
        return of_scene[args.scene]
    outside = [row for row in args.frames if not 0 <= row < count]
    if outside:
        raise UserError(f"--frames {outside[0]} is not in {dataset.split}, which has frames 0 to {count - 1}.")
    pictures = min(args.pictures, count)
    return list(args.frames) or [i * count // pictures for i in range(pictures)]


def check(args):
    """Raises `UserError` for what is wrong whatever the checkpoint is."""
    check_choices(task=(args.task, TASKS), precision=(args.precision, PRECISIONS), film=(args.film, ("gif", "mp4")))
    positive = ("batch_size", "pictures", "film_rate", "picture_stride", "mesh_cell")
    check_ranges(args, positive, ("workers", "seed", "min_score"))
    if () in (args.tta_scales, args.tta_angles) or min(args.tta_scales or (1.0,)) <= 0:
        raise UserError("--tta-scales must be above 0, and there must be at least one of them and of --tta-angles.")
    if args.frames and args.scene:
        raise UserError("--frames and --scene both say which frames; leave one out.")
    if args.out and args.out.is_file():
        raise UserError(f"--out {args.out} is a file; name a folder.")


def task_of(args, recipe):
    """What the checkpoint's model can be asked. Raises `UserError` where it is asked something else."""
    can = {DetectRecipe: "detect", SegmentRecipe: "segment"}.get(type(recipe), "render")
    made_by = {"detect": "finetune.py", "segment": "finetune.py --task segment", "render": "train.py"}
    if args.task not in (None, can):
        raise UserError(
            f"--task {args.task} needs a run of {made_by[args.task]}, and {args.checkpoint} is one of {made_by[can]}."
        )
    for task, flag in [
        (task, flag) for task, flags in TASK_FLAGS.items() for flag in flags if flag not in TASK_FLAGS[can]
    ]:
        if getattr(args, flag) != Args.__dataclass_fields__[flag].default:
            flag = "--" + flag.replace("_", "-")
            raise UserError(f"{flag} goes with a run of {made_by[task]}, not of {made_by[can]}.")
    asked = {"detect": len(CLASSES), "segment": len(LIDARSEG_CLASSES)}.get(can)
    if asked and (classes := getattr(recipe, can).classes) != asked:
        raise UserError(
            f"{args.checkpoint} tells {classes} classes apart, and nuScenes asks for {asked}; "
            f"fine-tune it with a recipe of {asked}."
        )
    return can


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
