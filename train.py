"""Pre-train an encoder by rendering what it saw.

    python train.py --modality camera                               # no data, no GPU: a synthetic city, a tiny model
    python train.py --modality lidar                                # the same for the LiDAR's encoder
    python train.py --modality fusion                               # both, into one volume
    python train.py --modality lidar --preset segment-tiny          # the sparse U-Net that segmentation starts from
    python train.py --modality camera --data-root /data/nuscenes --version v1.0-trainval
    torchrun --nproc-per-node 4 train.py --modality camera --data-root /data/nuscenes --version v1.0-trainval
    python train.py --modality camera --steps 4 --device cpu        # is everything in place?

The first lines take a few minutes on two CPU cores and end with pictures of what the model renders on frames
that it was never trained on. The paper's recipes (--preset camera-0.1 and lidar-0.075, the defaults with --data-root)
are 12 epochs at 4 and at 16 samples a step.
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# Before torch loads OpenMP. Its threads wait by spinning; as soon as anything else runs on the machine, they would
# keep each other from working for milliseconds at a time. On two cores a step beside another process took 10 times as
# long, now 2.5; on an idle machine it takes 8 % longer.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import tyro

from unipad.batch import CAMERAS
from unipad.checkpoint import take_weights
from unipad.config import CONVNEXT, UnetConfig, changed
from unipad.data.loader import held_out_batches, step_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import city_once
from unipad.data.tables import CAMERA_SWEEPS, TRAIN_VAL_SPLITS
from unipad.draw.views import rendered_views
from unipad.errors import UserError, check_choices, check_ranges
from unipad.evaluate.rendering import evaluate_rendering
from unipad.model.pretrain import Pretrain
from unipad.optimizer import lr_at, make_optimizer, set_rates
from unipad.recipes import PRETRAIN
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
    modality: str = "camera"  # what is encoded: camera, lidar, or both by fusion
    preset: str | None = None  # tiny, or a recipe of docs/recipes.md by its name (default: tiny without --data-root)
    data_root: Path | None = None  # folder of a nuScenes set (default: a synthetic city, made in data/synthetic)
    version: str = "v1.0-mini"  # version of the set: v1.0-mini or v1.0-trainval
    label_fraction: float = 1.0  # share of the training frames that is used, 0 to 1: every k-th frame
    out: Path | None = None  # run folder (default: outputs/train-<modality, or segment>/<time>)
    resume: str = "never"  # never; auto: go on with --out, or with the newest unfinished run; or a run folder
    init: tuple[Path, ...] = ()  # runs or checkpoints to take the encoders from: for fusion, a camera and a LiDAR one
    seed: int = 0  # seed of weights, order of samples, masks and rays
    steps: int | None = None  # optimizer steps that the schedule spans (default: from --epochs)
    stop_at: int | None = None  # optimizer step to save and stop at, the schedule unchanged (default: the last)
    epochs: float | None = None  # passes over the training frames (default: the recipe's)
    camera_sweeps: int | None = None  # frames of images a sample, its own and those before it (default: the recipe's)
    batch_size: int | None = None  # samples a step, over all processes (default: the recipe's)
    accumulate: int = 1  # passes that a step is split into, to save memory
    lr: float | None = None  # peak learning rate (default: the recipe's)
    backbone: str | None = None  # ConvNeXt tiny, small, base or large (default: the recipe's)
    mask_ratio: float | None = None  # share of 32-pixel image blocks hidden, 0 to 1 (default: the recipe's)
    voxel_mask_ratio: float | None = None  # share of the blocks of LiDAR voxels hidden, 0 to 1 (default: the recipe's)
    rays_from: str | None = None  # cameras or lidar (default: cameras; lidar where the set has no images)
    ray_choice: str | None = None  # depth, random or dilation (default: the recipe's)
    rays_per_view: int | None = None  # rays a camera and step (default: the recipe's)
    rgb_weight: float | None = None  # weight of the color loss; 0: learn depth alone (default: the recipe's)
    renderer: str | None = None  # neus, volsdf or unisurf (default: the recipe's)
    workers: int | None = None  # data loading processes of each training process (default: 4 with a GPU, 1 without)
    precision: str | None = None  # bf16, fp16 or fp32, of the encoder (default: bf16 or fp16 with a GPU, fp32 without)
    checkpointing: bool = False  # forget activations of the ConvNeXt and compute them again: less memory, more time
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    deterministic: bool = False  # bit-equal runs on a GPU too, by slower kernels
    tune: bool = False  # try how to launch kernels, but for --deterministic; what the run's tuning.json has is kept to
    log_every: int = 10  # steps between progress lines
    val_every: int | None = None  # steps between validations (default: a third of the run)
    val_samples: int = 12  # held-out frames that a validation renders
    picture_stride: int = 2  # pixels between the rays of a picture
    save_every: int | None = None  # steps between checkpoints (default: a twentieth of the run, at most 1000)


def main(args: Args):
    recipe = recipe_of(args)
    optim = recipe.optim
    with start(args.device, args.deterministic) as world:
        device = world.device
        say = partial(print, flush=True) if world.is_main else lambda *_: None

        # Data
        with world.main_first():
            root = args.data_root or city_once(recipe.data.camera_sweeps - 1)
        train_split, val_split = TRAIN_VAL_SPLITS[args.version]
        box = (recipe.grid.low, recipe.grid.high)  # points outside are no targets: no ray reaches them
        with world.main_first():  # the first to come builds the index
            seen = NuScenesDataset.has_images(root, args.version, train_split)
            recipe = replace(recipe, data=replace(recipe.data, cameras=casts_from_cameras(args, seen, say)))
            settings = (recipe.data, args.label_fraction, box, recipe.augment)
            train_set = NuScenesDataset(root, args.version, train_split, *settings)
            val_set = NuScenesDataset(root, args.version, val_split, recipe.data, point_range=box)
        steps = args.steps or max(1, round(optim.epochs * len(train_set) / optim.batch_size))
        passes = world.size * args.accumulate
        if optim.batch_size % passes:
            raise UserError(
                f"--batch-size {optim.batch_size} cannot be split over {world.size} processes x {args.accumulate} "
                f"passes; use a multiple of {passes}."
            )
        share = optim.batch_size // passes  # samples of one pass of one process
        workers = args.workers if args.workers is not None else (4 if device.type == "cuda" else 1)

        # Model and optimizer
        torch.manual_seed(args.seed)
        net = Pretrain(recipe).to(device)
        net.encoder.set_checkpointing(args.checkpointing)
        take_weights(net, "encoder.", args.init, "--init", say)
        model = (
            torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
        )  # all take the main one's weights
        optimizer = make_optimizer(net, optim)
        autocast, scaler = mixed_precision(args.precision, device)
        parts = {"model": net, "optimizer": optimizer, "scaler": scaler}

        # A new run, or one to go on with
        config = {"args": to_dict(replace(args, data_root=root.resolve())), "recipe": to_dict(recipe), "steps": steps}
        kinds = (Args, type(recipe))
        kind = f"train-{'segment' if isinstance(recipe.lidar, UnetConfig) else args.modality}"
        run, saved = RunFolder.new_or_resumed(kind, args.out, args.resume, config, world, kinds)
        if args.tune:
            run.tune()
        first, before, after = 0, None, None  # metrics of the untrained model and of the last look
        if saved:
            first, before, after = saved["step"], saved["before"], saved["after"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        last = min(steps, args.stop_at or steps)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        say(f"{run.path}: {len(train_set)} frames, {millions:.1f} M weights, steps {first} to {last}, {device}")

        def save(step, keep=False):
            state = {name: part.state_dict() for name, part in parts.items()}
            run.save(state | {"step": step, "before": before, "after": after, "config": config}, keep)

        def look(step):
            """Render held-out frames: metrics and a picture."""
            with autocast:
                frames = held_out_batches(val_set, args.val_samples, world.rank, world.size)
                metrics = evaluate_rendering(net, frames, args.seed, device)
                if world.is_main:
                    _, frame = next(held_out_batches(val_set, 1))
                    draws = generators(args.seed, 0, [0], device)
                    picture = rendered_views(net, frame.to(device), draws, args.picture_stride)
                    run.picture("val", picture, step)
            run.scalars({f"val/{name}": value for name, value in metrics.items()}, step)
            say(f"step {step}/{steps}  held-out frames: {format_metrics(metrics)}")
            return metrics

        if not saved:
            before = look(0)
        val_every = args.val_every or math.ceil(steps / 3)
        save_every = args.save_every or min(1000, math.ceil(steps / 20))
        # What a step sees is a function of (seed, step), its order and its random numbers too: none of it needs saving.
        start_at, pinned = first * args.accumulate, device.type == "cuda"
        batches = step_batches(train_set, share, start_at, args.seed, world.rank, world.size, workers, pinned)
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
                        losses, rays_missed = model(batch.to(device), draws)
                    loss = sum(losses.values())
                    scaler.scale(loss / args.accumulate).backward()
                for name, value in {"loss": loss, **losses, "rays_missed": rays_missed}.items():
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
                rates["rays_per_s"] = speed * len(CAMERAS) * recipe.rays.per_view
                run.scalars({f"train/{name}": value for name, value in (values | rates).items()}, done)
                left = timedelta(seconds=round((last - done) * optim.batch_size / speed))
                say(f"step {done}/{steps}  {format_metrics(values)}  {format_metrics(rates)}  {left} to go")
            if look_now:
                after = look(done)
                since, clock = done, time.perf_counter()
            if save_now:
                save(done, keep=look_now)
            if stopped:
                say(f"stopped after step {done}, saved; go on with --resume {run.path}")
                break

        run.close()
        if unreadable:
            say(f"{len(unreadable)} frames could not be read and were replaced; they are named above.")
        say(summary(before, after, run.path) if after else f"checkpoint   {run.path / 'checkpoints' / 'last.pt'}")


def recipe_of(args):
    """The preset with the flags' changes."""
    check_choices(modality=(args.modality, PRETRAIN))
    presets = PRETRAIN[args.modality]
    name = args.preset or (list(presets)[-1] if args.data_root else "tiny")
    check_choices(
        preset=(name, presets),
        version=(args.version, TRAIN_VAL_SPLITS),
        precision=(args.precision, PRECISIONS),
        backbone=(args.backbone, CONVNEXT),
        ray_choice=(args.ray_choice, ("depth", "random", "dilation")),
        renderer=(args.renderer, ("neus", "volsdf", "unisurf")),
        rays_from=(args.rays_from, ("cameras", "lidar")),
        camera_sweeps=(args.camera_sweeps, range(1, CAMERA_SWEEPS + 2)),
    )
    positive = ("steps", "stop_at", "epochs", "batch_size", "accumulate", "rays_per_view", "log_every", "val_every")
    positive += ("val_samples", "picture_stride", "save_every", "lr")
    check_ranges(args, positive, ("workers", "seed", "rgb_weight"), ("mask_ratio", "voxel_mask_ratio"))
    recipe = presets[name]
    needs = {"mask_ratio": "camera", "backbone": "camera", "camera_sweeps": "camera", "voxel_mask_ratio": "lidar"}
    for flag, encoder in needs.items():
        if getattr(args, flag) is not None and getattr(recipe, encoder) is None:
            raise UserError(f"--{flag.replace('_', '-')} does not go with --modality {args.modality}; leave it out.")
    depths, widths = CONVNEXT[args.backbone] if args.backbone else (None, None)
    return replace(
        recipe,
        data=changed(recipe.data, camera_sweeps=args.camera_sweeps),
        camera=changed(recipe.camera, depths=depths, widths=widths, mask_ratio=args.mask_ratio),
        lidar=changed(recipe.lidar, mask_ratio=args.voxel_mask_ratio),
        rays=changed(recipe.rays, strategy=args.ray_choice, per_view=args.rays_per_view),
        render=changed(recipe.render, method=args.renderer, rgb_weight=args.rgb_weight),
        optim=changed(recipe.optim, lr=args.lr, epochs=args.epochs, batch_size=args.batch_size),
    )


def casts_from_cameras(args, has_images, say):
    """Whether rays start at the cameras, or the images are left aside."""
    if args.rays_from == "lidar" or (not has_images and args.rays_from is None and args.modality == "lidar"):
        if args.modality != "lidar" or args.rgb_weight:
            raise UserError("--rays-from lidar shows no images: it goes with --modality lidar and no --rgb-weight.")
        if not args.rays_from:
            say("the set has no images: rays are cast from the LiDAR")
        return False
    return True


def summary(before, after, path):
    """What the run improved and where to look."""
    lines = [f"{'held-out frames':<20}{'before':>10}{'after':>10}"]
    lines += [f"{name:<20}{before[name]:>10.3f}{after[name]:>10.3f}" for name in before]
    lines += [f"pictures     {path / 'images'}", f"checkpoint   {path / 'checkpoints' / 'last.pt'}"]
    return "\n".join([*lines, f"curves       tensorboard --logdir {path.parent}"])


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
