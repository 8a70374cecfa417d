"""Fine-tune a pre-trained encoder for 3D object detection, LiDAR segmentation or occupancy, or train from scratch.

    python finetune.py --modality lidar                             # no data, no GPU: a synthetic city, a tiny model
    python finetune.py --modality lidar --pretrained outputs/train-lidar --label-fraction 0.2
    python finetune.py --task segment                               # a class for every LiDAR point
    python finetune.py --task occupancy --modality camera           # a class for every voxel around the vehicle
    python finetune.py --modality camera --pretrained RUN --data-root /data/nuscenes --version v1.0-trainval
    torchrun --nproc-per-node 4 finetune.py --modality lidar --data-root /data/nuscenes --version v1.0-trainval
    python finetune.py --task segment --preset segment --help       # the settings of a recipe and their values
    python finetune.py --config outputs/finetune-lidar/RUN --seed 1 # a run's settings again, with another seed
    python finetune.py --resume outputs/finetune-lidar/RUN          # resume a run, with its settings

The first command takes a few minutes on two CPU cores. The paper's recipes are presets: its ablations, which measure
the gain from pre-training with a half or a fifth of the labels, and its final models.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

# Idle OpenMP threads spin less. Must be set before torch loads OpenMP; see train.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from unipad.exit import end_at_once, exit_on_user_error

if __name__ == "__main__":
    end_at_once()  # on Ctrl-C during the imports

import torch
import tyro

from unipad import cli
from unipad.checkpoint import take_weights
from unipad.compile import compile_parts, uncompiled
from unipad.config import DetectRecipe, OccupancyRecipe, SegmentRecipe
from unipad.data.cutpaste import load_objects
from unipad.data.dataset import DEFAULT_DATASET, dataset_class
from unipad.data.loader import held_out_batches, step_batches
from unipad.draw.boxes import detection_views
from unipad.draw.occupancy import occupancy_views
from unipad.draw.scene3d import detected_scene, occupied_scene, segmented_scene
from unipad.draw.segments import segment_views
from unipad.errors import UserError, check_ranges
from unipad.evaluate.detection import evaluate_detections
from unipad.evaluate.occupancy import evaluate_occupancy
from unipad.evaluate.segmentation import evaluate_segmentation
from unipad.model.detect import Detector
from unipad.model.occupancy import OccupancyModel
from unipad.model.segment import Segmenter
from unipad.optimizer import lr_factor_at, make_optimizer, set_rates
from unipad.progress import Progress, format_metrics
from unipad.recipes import DEFAULT_PRESET, DETECT, OCCUPANCY, SEGMENT
from unipad.run_folder import RunFolder, find_run, lock_folder, resumed, run_config
from unipad.runtime import StopOnSignal, generators, local_gradients, mixed_precision, start


@dataclass(frozen=True)
class Args:
    # predict boxes of ten classes, one of 16 classes for every LiDAR point, or one of 18 for every voxel
    task: Literal["detect", "segment", "occupancy"] = "detect"
    modality: Literal["camera", "lidar", "fusion"] | None = None  # None: camera; for segmentation, lidar
    preset: str | None = None  # a recipe of docs/recipes.md; None: tiny, or the paper's with --data-root
    backbone: Literal["tiny", "small", "base", "large"] | None = None  # ConvNeXt size; None: the recipe's
    config: Path | None = None  # take all settings from this run or config.json; other flags override them
    resume: str = "never"  # a run's folder: resume it with its settings; auto: the run in --out, or the newest
    pretrained: tuple[Path, ...] = ()  # runs or checkpoints to take encoders from; for fusion, one or two
    freeze_encoder: bool = False  # train only the head, as a probe; batch norms still update running statistics
    data_root: Path | None = None  # folder of the dataset; None: a synthetic city, generated in data/synthetic
    version: str | None = None  # version of the dataset, such as v1.0-trainval; None: its default, v1.0-mini
    dataset: str = DEFAULT_DATASET  # package.module:Class of another dataset; see unipad/data/dataset.py
    # run folder; None: outputs/finetune-<modality, segment, or occupancy-modality>/<time>
    out: Path | None = None
    seed: int = 0  # seed of weights, sample order, augmentation and noise
    steps: int | None = None  # optimizer steps in the schedule; None: from --epochs
    stop_at: int | None = None  # save and stop after this step, with the schedule unchanged; None: the last
    accumulate: int = 1  # micro-batches per step and process, to save memory
    workers: int | None = None  # data loading processes per training process; None: up to 4 with a GPU, 1 without
    precision: Literal["bf16", "fp16", "fp32"] | None = None  # of the encoder; None: bf16 or fp16 on a GPU, else fp32
    checkpointing: bool = False  # recompute ConvNeXt activations in the backward pass: less memory, more time
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    deterministic: bool = False  # bitwise reproducible runs on a GPU too, with slower kernels
    tune: bool = False  # autotune kernel launches (off with --deterministic); reuse choices in tuning.json
    compile: bool = False  # run parts of the model under torch.compile; docs/recipes.md says which, and if it helps
    log_every: int = 10  # steps between progress lines
    val_every: int | None = None  # steps between validations on the whole split; None: a third of the run; 0: none
    save_every: int | None = None  # steps between checkpoints; None: a twentieth of the run, at most 1000
    # the settings of the preset, as changed by flags
    recipe: Annotated[DetectRecipe | SegmentRecipe | OccupancyRecipe | None, tyro.conf.arg(name="")] = None


@dataclass(frozen=True)
class Task:
    """What is specific to fine-tuning for one task."""

    presets: dict  # modality -> name -> recipe
    model: type  # a module made from a recipe; maps a batch and generators to losses
    evaluate: Callable  # model, dataset, folder, world, workers= -> metrics by name
    predict: Callable  # model, batch -> the predictions for each sample
    picture: Callable  # batch of one, its predictions -> picture
    scene: Callable  # batch of one, its predictions -> 3D view
    of_points: bool  # True: predicts a class for every LiDAR point, outside the grid too
    labeled: Callable = lambda dataset: dataset  # dataset -> the dataset with the task's labels, or a `DataError`
    folder: str = "finetune-{modality}"  # parent of the runs, in outputs/


TASKS = {
    "detect": Task(
        presets=DETECT,
        model=Detector,
        evaluate=evaluate_detections,
        predict=Detector.detect,
        picture=detection_views,
        scene=detected_scene,
        of_points=False,
    ),
    "segment": Task(
        presets=SEGMENT,
        model=Segmenter,
        evaluate=evaluate_segmentation,
        predict=Segmenter.segment,
        picture=segment_views,
        scene=segmented_scene,
        of_points=True,
        labeled=lambda dataset: dataset.require_point_labels() or dataset,
        folder="finetune-segment",
    ),
    "occupancy": Task(
        presets=OCCUPANCY,
        model=OccupancyModel,
        evaluate=evaluate_occupancy,
        predict=OccupancyModel.predict,
        picture=occupancy_views,
        scene=occupied_scene,
        of_points=False,
        labeled=lambda dataset: dataset.with_occupancy(),
        folder="finetune-occupancy-{modality}",
    ),
}


def parse(argv=None) -> Args:
    args = cli.parse(Args, lambda args: cli.args_of_run(args) or with_preset(args), __doc__, argv)
    positive = ("steps", "stop_at", "accumulate", "log_every", "save_every")
    positive += ("recipe.optim.epochs", "recipe.optim.batch_size", "recipe.optim.lr")
    check_ranges(args, positive, ("workers", "seed", "val_every"))
    cli.check_recipe(args.recipe)
    return args


def with_preset(args):
    """The flags, with the field `recipe` set to the preset that they choose, and --modality to its default."""
    presets = TASKS[args.task].presets
    modality = args.modality or next(iter(presets))
    if modality not in presets:
        raise UserError(f"--modality {modality} does not work with --task {args.task}; use {', '.join(presets)}.")
    default = DEFAULT_PRESET[args.task if args.task in DEFAULT_PRESET else modality]
    return cli.with_preset(args, presets, modality, default)


def main(args: Args):
    task, recipe, optim = TASKS[args.task], args.recipe, args.recipe.optim
    with start(args.device, args.deterministic) as world:
        device, print0, workers = world.device, world.print0, world.workers(args.workers)
        path, saved = find_run(task.folder.format(modality=args.modality), args.out, args.resume, world)
        if not saved:
            cli.check_frozen_stages(recipe, args.pretrained, "--pretrained")

        # Data
        args, train_set, val_set = open_datasets(args, world)
        steps = args.steps or max(1, round(optim.epochs * len(train_set) / optim.batch_size))
        micro_batch = world.micro_batch(optim.batch_size, args.accumulate)
        pasting_epochs = optim.epochs - (recipe.paste.off_epochs if recipe.paste else 0)
        # objects are pasted into this many samples of all processes, counted from the start of training
        paste_until = max(0, round(pasting_epochs / optim.epochs * steps)) * optim.batch_size

        # Model and optimizer
        torch.manual_seed(args.seed)
        net = task.model(recipe).to(device)
        net.encoder.set_checkpointing(args.checkpointing)
        if not saved:
            take_weights(net, "encoder.", args.pretrained, "--pretrained", print0)
        if args.freeze_encoder:
            net.encoder.requires_grad_(False)
        if args.compile:
            compile_parts(net, world)
        # DistributedDataParallel broadcasts the main process's weights
        model = torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
        optimizer = make_optimizer(net, optim)
        autocast, scaler = mixed_precision(args.precision, device)

        # Run
        run = RunFolder(path, run_config(args, steps, train_set.contents(), saved), world, saved)
        lock_folder(path / "eval", world)  # where validations and eval.py write
        if args.tune:
            run.tune()
        parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
        first, metrics = resumed(saved, parts)  # metrics: those of the last validation
        last = min(steps, args.stop_at or steps)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        print0(f"{path}: {len(train_set)} frames, {millions:.1f} M weights, steps {first} to {last}, {device}")

        # Loop
        val_every = math.ceil(steps / 3) if args.val_every is None else args.val_every
        save_every = args.save_every or min(1000, math.ceil(steps / 20))
        batches = step_batches(
            train_set,
            micro_batch,
            start=first * args.accumulate,
            seed=args.seed,
            rank=world.rank,
            world=world.size,
            workers=workers,
            pinned=device.type == "cuda",
            paste_until=paste_until,
        )
        stop = StopOnSignal(world)
        progress = Progress(run, world, first, last, steps, optim.batch_size)

        # At the top of the loop `step` steps are done; the turn at `last` only validates. Not validated: step 0, where
        # the head is untrained, and a step that was validated before the run resumed.
        for step in range(first, last + 1):
            if val_every and (step % val_every == 0 or step == last) and step > max(0, run.last_validated_step):
                with run.validation(step, parts, metrics), stop.at_once(), autocast, uncompiled(args.compile):
                    metrics.update(validate(net, val_set, run, args, world, step))
                progress.restart(step)
            if step == last:
                break

            set_rates(optimizer, optim, step, steps)
            values = {}
            for i in range(args.accumulate):
                batch, bad_frames = next(batches)
                progress.report_unreadable(bad_frames)
                rngs = generators(args.seed, step, world.sample_slots(i, micro_batch), device)
                with local_gradients(model, more=i < args.accumulate - 1):
                    with autocast, progress.explains_divergence(net, step + 1):
                        losses = model(batch.to(device), rngs)
                    loss = sum(losses.values())
                    scaler.scale(loss / args.accumulate).backward()
                for name, value in {"loss": loss, **losses}.items():
                    values[name] = values.get(name, 0) + value.detach() / args.accumulate
            scaler.unscale_(optimizer)
            values["grad_norm"] = torch.nn.utils.clip_grad_norm_(net.parameters(), optim.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            done = step + 1
            report_now = done % args.log_every == 0 or done == last
            stop_now = stop.asked(host_waits=report_now)
            save_now = done % save_every == 0 or stop_now or done == last or val_every and done % val_every == 0
            # waits for the GPU; other steps wait only in fp16's scaler and in `backend.host_wait`
            if report_now or save_now:
                values = progress.checked_means(values, scaler, done)
            if report_now:
                progress.report(done, values, lr=optim.lr * lr_factor_at(optim, step, steps))
            if save_now:
                run.save(done, parts, metrics)
            if stop_now:
                stop.end(f"stopped after step {done}, saved; resume with --resume {path}")

        progress.sum_up()
        print0(summary(metrics, val_set.split, path))


def open_datasets(args, world):
    """(args, training set, validation set); in args, the dataset's folder and version are filled in where not given."""
    task, recipe = TASKS[args.task], args.recipe
    dataset = dataset_class(args.dataset)
    if args.task not in dataset.tasks:
        raise UserError(f"--dataset {args.dataset} does not support --task {args.task}; see unipad/data/dataset.py.")
    version = args.version or dataset.default_version
    # the encoder ignores points outside the grid
    point_range = None if task.of_points else (recipe.grid.low, recipe.grid.high)
    with world.main_first():  # generates the city, builds the index, cuts out the objects
        root = Path(os.path.expanduser(args.data_root or dataset.default_root(recipe.data)))
        train_set, val_set = dataset.train_and_val(root, version, recipe, recipe.label_fraction, point_range)
        train_set, val_set = task.labeled(train_set), task.labeled(val_set)
        if recipe.paste:
            train_set = train_set.with_objects(load_objects(train_set, recipe.paste, world.workers(args.workers)))
    if recipe.balanced:
        train_set = train_set.balanced(args.seed)
    return replace(args, data_root=root.resolve(), version=version), train_set, val_set


def validate(net, val_set, run, args, world, step):
    """Predict the whole validation split: returns the metrics, and logs them with a picture and a 3D view."""
    task = TASKS[args.task]
    metrics = task.evaluate(net, val_set, run.path / "eval", world, workers=world.workers(args.workers))
    if world.is_main:
        _, frame = next(held_out_batches(val_set, 1))
        frame = frame.to(world.device)
        net.eval()
        (predicted,) = task.predict(net, frame)
        net.train()
        run.picture("val", task.picture(frame, predicted), step)
        run.scene("val", task.scene(frame, predicted), step)
    run.scalars({f"val/{name}": value for name, value in metrics.items()}, step)
    world.print0(f"step {step}/{run.config['steps']}  {val_set.split}: {format_metrics(metrics)}")
    return metrics


def summary(metrics, split, path):
    """The last metrics, and where the results are, as text."""
    lines = [f"{split:<13}{'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}"] if metrics else []
    lines += [f"pictures     {path / 'images'}", f"checkpoint   {path / 'checkpoints' / 'last.pt'}"]
    lines += [f"curves       tensorboard --logdir {path.parent}"]
    return "\n".join([*lines, f"all classes  python eval.py {path}"])


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse())
