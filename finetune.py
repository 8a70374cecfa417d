"""Fine-tune a pre-trained encoder for 3D object detection or LiDAR segmentation, or train one from scratch.

    python finetune.py --modality lidar                             # no data, no GPU: a synthetic city, a tiny model
    python finetune.py --modality lidar --pretrained outputs/train-lidar --label-fraction 0.2
    python finetune.py --task segment                               # a class for every LiDAR point
    python finetune.py --modality camera --pretrained RUN --data-root /data/nuscenes --version v1.0-trainval
    torchrun --nproc-per-node 4 finetune.py --modality lidar --data-root /data/nuscenes --version v1.0-trainval

The first line takes a few minutes on two CPU cores. The paper's recipes are presets: the ablations are what its
headline gains were measured with (a half or a fifth of the labels), the others are its final models.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# Before torch loads OpenMP; see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import tyro

from unipad.checkpoint import take_weights
from unipad.config import CONVNEXT, changed
from unipad.data.cutpaste import load_objects
from unipad.data.loader import held_out_batches, step_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import city_once
from unipad.data.tables import CAMERA_SWEEPS, TRAIN_VAL_SPLITS
from unipad.draw.boxes import detection_views
from unipad.draw.segments import segment_views
from unipad.errors import UserError, check_choices, check_ranges
from unipad.evaluate.detection import evaluate_detections
from unipad.evaluate.segmentation import evaluate_segmentation
from unipad.model.detect import Detector
from unipad.model.segment import Segmenter
from unipad.optimizer import lr_at, make_optimizer, set_rates
from unipad.recipes import DETECT, SEGMENT
from unipad.runtime import (
    PRECISIONS,
    RunFolder,
    StopOnSignal,
    exit_on_user_error,
    format_metrics,
    generators,
    mean_over_processes,
    memory_mb,
    mixed_precision,
    start,
    to_dict,
)


@dataclass(frozen=True)
class Args:
    task: str = "detect"  # what is learned: detect, boxes of ten classes; segment, one of 16 classes a LiDAR point
    modality: str | None = None  # what is encoded: camera, lidar, or both by fusion (default: camera; segment: lidar)
    preset: str | None = None  # tiny, or a recipe of the paper by its name (default: tiny without --data-root)
    pretrained: tuple[Path, ...] = ()  # runs or checkpoints to take encoders from; for fusion up to two (default: none)
    data_root: Path | None = None  # folder of a nuScenes set (default: a synthetic city, made in data/synthetic)
    version: str = "v1.0-mini"  # version of the set: v1.0-mini or v1.0-trainval
    label_fraction: float | None = None  # share of the training frames, 0 to 1: every k-th (default: the recipe's)
    out: Path | None = None  # run folder (default: outputs/finetune-<modality, or segment>/<time>)
    resume: str = "never"  # never; auto: go on with --out, or with the newest unfinished run; or a run folder
    seed: int = 0  # seed of weights, order of samples, augmentation and noise
    steps: int | None = None  # optimizer steps that the schedule spans (default: from --epochs)
    stop_at: int | None = None  # optimizer step to save and stop at, the schedule unchanged (default: the last)
    epochs: float | None = None  # passes over the training frames (default: the recipe's)
    camera_sweeps: int | None = None  # frames of images a sample, its own and those before it (default: the recipe's)
    batch_size: int | None = None  # samples a step, over all processes (default: the recipe's)
    accumulate: int = 1  # passes that a step is split into, to save memory
    lr: float | None = None  # peak learning rate (default: the recipe's)
    paste_off_epochs: float | None = None  # last epochs without objects cut out of other frames (default: the recipe's)
    backbone: str | None = None  # ConvNeXt tiny, small, base or large (default: the recipe's)
    workers: int | None = None  # data loading processes of each training process (default: 4 with a GPU, 1 without)
    precision: str | None = None  # bf16, fp16 or fp32, of the encoder (default: bf16 or fp16 with a GPU, fp32 without)
    checkpointing: bool = False  # forget activations of the ConvNeXt and compute them again: less memory, more time
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    deterministic: bool = False  # bit-equal runs on a GPU too, by slower kernels
    tune: bool = False  # try how to launch kernels, but for --deterministic; what the run's tuning.json has is kept to
    log_every: int = 10  # steps between progress lines
    val_every: int | None = None  # steps between looks at the whole validation split (default: a third of the run)
    save_every: int | None = None  # steps between checkpoints (default: a twentieth of the run, at most 1000)


@dataclass(frozen=True)
class Task:
    """What fine-tuning for one task has of its own."""

    presets: dict  # modality -> name -> recipe; the first modality is the default
    model: type  # of a recipe; a batch and generators to losses
    evaluate: Callable  # model, dataset, folder, world, workers= -> metrics by name
    picture: Callable  # model, batch of one -> picture
    of_points: bool  # every LiDAR point counts, also outside the grid; False: boxes inside


TASKS = {
    "detect": Task(
        presets=DETECT,
        model=Detector,
        evaluate=evaluate_detections,
        picture=lambda net, batch: detection_views(batch, *net.detect(batch)),
        of_points=False,
    ),
    "segment": Task(
        presets=SEGMENT,
        model=Segmenter,
        evaluate=evaluate_segmentation,
        picture=lambda net, batch: segment_views(batch, *net.segment(batch)),
        of_points=True,
    ),
}


def main(args: Args):
    recipe = recipe_of(args)
    task, optim = TASKS[args.task], recipe.optim
    args = replace(args, modality=args.modality or next(iter(task.presets)))
    with start(args.device, args.deterministic) as world:
        device = world.device
        say = partial(print, flush=True) if world.is_main else lambda *_: None

        # Data
        train_split, val_split = TRAIN_VAL_SPLITS[args.version]
        box = None if task.of_points else (recipe.grid.low, recipe.grid.high)  # nothing outside is seen or found
        workers = args.workers if args.workers is not None else (4 if device.type == "cuda" else 1)
        with world.main_first():  # the first to come makes the city, builds the index and cuts the objects out
            root = args.data_root or city_once(recipe.data.camera_sweeps - 1)
            settings = (recipe.data, recipe.label_fraction, box, recipe.augment)
            train_set = NuScenesDataset(root, args.version, train_split, *settings)
            val_set = NuScenesDataset(root, args.version, val_split, recipe.data, point_range=box)
            if recipe.paste:
                train_set = train_set.with_objects(load_objects(train_set, recipe.paste, workers))
        if task.of_points:
            train_set.require_point_labels()
            val_set.require_point_labels()
        if recipe.balanced:
            train_set = train_set.balanced(args.seed)
        steps = args.steps or max(1, round(optim.epochs * len(train_set) / optim.batch_size))
        passes = world.size * args.accumulate
        if optim.batch_size % passes:
            raise UserError(
                f"--batch-size {optim.batch_size} cannot be split over {world.size} processes x {args.accumulate} "
                f"passes; use a multiple of {passes}."
            )
        share = optim.batch_size // passes  # samples of one pass of one process
        pasted_epochs = optim.epochs - (recipe.paste.off_epochs if recipe.paste else 0)
        paste_until = max(0, round(pasted_epochs / optim.epochs * steps)) * optim.batch_size  # position in the stream

        # Model and optimizer
        torch.manual_seed(args.seed)
        net = task.model(recipe).to(device)
        net.encoder.set_checkpointing(args.checkpointing)
        take_weights(net, "encoder.", args.pretrained, "--pretrained", say)
        model = (
            torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
        )  # all take the main one's weights
        optimizer = make_optimizer(net, optim)
        autocast, scaler = mixed_precision(args.precision, device)
        parts = {"model": net, "optimizer": optimizer, "scaler": scaler}

        # A new run, or one to go on with
        config = {"args": to_dict(replace(args, data_root=root.resolve())), "recipe": to_dict(recipe), "steps": steps}
        kinds = (Args, type(recipe))
        kind = f"finetune-{args.modality if args.task == 'detect' else args.task}"
        run, saved = RunFolder.new_or_resumed(kind, args.out, args.resume, config, world, kinds)
        if args.tune:
            run.tune()
        first, found = 0, None  # metrics of the last look
        if saved:
            first, found = saved["step"], saved["found"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        last = min(steps, args.stop_at or steps)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        say(f"{run.path}: {len(train_set)} frames, {millions:.1f} M weights, steps {first} to {last}, {device}")

        def save(step, keep=False):
            state = {name: part.state_dict() for name, part in parts.items()}
            run.save(state | {"step": step, "found": found, "config": config}, keep)

        def look(step):
            """Detect or segment in the whole validation split: metrics and a picture."""
            with autocast:
                metrics = task.evaluate(net, val_set, run.path / "eval", world, workers=workers)
                if world.is_main:
                    _, frame = next(held_out_batches(val_set, 1))
                    net.eval()
                    run.picture("val", task.picture(net, frame.to(device)), step)
                    net.train()
            run.scalars({f"val/{name}": value for name, value in metrics.items()}, step)
            say(f"step {step}/{steps}  {val_split}: {format_metrics(metrics)}")
            return metrics

        val_every = args.val_every or math.ceil(steps / 3)
        save_every = args.save_every or min(1000, math.ceil(steps / 20))
        start_at, pinned = first * args.accumulate, device.type == "cuda"
        stream = (share, start_at, args.seed, world.rank, world.size, workers, pinned, paste_until)
        batches = step_batches(train_set, *stream)
        unreadable = set()
        stop = StopOnSignal()
        since, clock = first, time.perf_counter()

        for step in range(first, last):
            set_rates(optimizer, optim, step, steps)
            values = {}
            for part in range(args.accumulate):
                batch, bad_frames = next(batches)
                position = (part * world.size + world.rank) * share  # of these samples among the step's
                draws = generators(args.seed, step, range(position, position + share), device)
                only_adds = world.size > 1 and part < args.accumulate - 1  # the last pass averages over processes
                with model.no_sync() if only_adds else nullcontext():
                    with autocast:
                        losses = model(batch.to(device), draws)
                    loss = sum(losses.values())
                    scaler.scale(loss / args.accumulate).backward()
                for name, value in {"loss": loss, **losses}.items():
                    values[name] = values.get(name, 0) + value.detach() / args.accumulate
                for frame in set(bad_frames) - unreadable:
                    print(f"skipped {frame}", file=sys.stderr)
                unreadable.update(bad_frames)
            scaler.unscale_(optimizer)
            values["grad_norm"] = torch.nn.utils.clip_grad_norm_(net.parameters(), optim.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            report = done % args.log_every == 0 or done == last
            look_now = done % val_every == 0 or done == last
            stopped = (report or world.size == 1) and stop.asked(world)
            save_now = done % save_every == 0 or look_now or stopped
            if report or save_now:  # the host waits here, in `backend.host_wait`s and in the scaler of fp16
                values = mean_over_processes(values)
                # fp16 skips a step whose gradient overflows; anything else that is not finite would be saved
                if not math.isfinite(values["loss"] + (0 if scaler.is_enabled() else values["grad_norm"])):
                    raise UserError(f"the loss is not finite at step {done}: lower --lr or use --precision fp32.")
            if report:
                speed = optim.batch_size * (done - since) / (time.perf_counter() - clock)
                since, clock = done, time.perf_counter()
                rates = {"lr": optim.lr * lr_at(optim, step, steps), "samples_per_s": speed, **memory_mb(device)}
                run.scalars({f"train/{name}": value for name, value in (values | rates).items()}, done)
                left = timedelta(seconds=round((last - done) * optim.batch_size / speed))
                say(f"step {done}/{steps}  {format_metrics(values)}  {format_metrics(rates)}  {left} to go")
            if look_now:
                found = look(done)
                since, clock = done, time.perf_counter()
            if save_now:
                save(done, keep=look_now)
            if stopped:
                say(f"stopped after step {done}, saved; go on with --resume {run.path}")
                break

        run.close()
        if unreadable:
            say(f"{len(unreadable)} frames could not be read and were replaced; they are named above.")
        say(summary(found, val_split, run.path))


def recipe_of(args):
    """The preset with the flags' changes."""
    check_choices(task=(args.task, TASKS))
    of_task = TASKS[args.task].presets
    modality = args.modality or next(iter(of_task))
    if modality in DETECT and modality not in of_task:
        raise UserError(f"--modality {modality} does not go with --task {args.task}; use {', '.join(of_task)}.")
    check_choices(modality=(modality, of_task))
    presets = of_task[modality]
    name = args.preset or (list(presets)[-1] if args.data_root else "tiny")
    check_choices(
        preset=(name, presets),
        version=(args.version, TRAIN_VAL_SPLITS),
        precision=(args.precision, PRECISIONS),
        backbone=(args.backbone, CONVNEXT),
        camera_sweeps=(args.camera_sweeps, range(1, CAMERA_SWEEPS + 2)),
    )
    positive = ("steps", "stop_at", "epochs", "batch_size", "accumulate", "log_every", "val_every", "save_every", "lr")
    check_ranges(args, positive, ("workers", "seed", "paste_off_epochs"))
    recipe = presets[name]
    if args.paste_off_epochs is not None and recipe.paste is None:
        raise UserError(f"--paste-off-epochs does not go with --preset {name}, which pastes nothing; leave it out.")
    for flag in ("backbone", "camera_sweeps"):
        if getattr(args, flag) is not None and recipe.camera is None:
            raise UserError(f"--{flag.replace('_', '-')} does not go with --modality {modality}; leave it out.")
    depths, widths = CONVNEXT[args.backbone] if args.backbone else (None, None)
    return replace(
        changed(recipe, label_fraction=args.label_fraction),
        data=changed(recipe.data, camera_sweeps=args.camera_sweeps),
        paste=changed(recipe.paste, off_epochs=args.paste_off_epochs),
        camera=changed(recipe.camera, depths=depths, widths=widths),
        optim=changed(recipe.optim, lr=args.lr, epochs=args.epochs, batch_size=args.batch_size),
    )


def summary(found, split, path):
    """How good the model is and where to look."""
    lines = [f"{split:<13}{'  '.join(f'{name} {value:.3f}' for name, value in found.items())}"] if found else []
    lines += [f"pictures     {path / 'images'}", f"checkpoint   {path / 'checkpoints' / 'last.pt'}"]
    lines += [f"curves       tensorboard --logdir {path.parent}"]
    return "\n".join([*lines, f"all classes  python eval.py {path}"])


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
