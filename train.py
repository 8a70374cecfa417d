"""Pre-train an encoder of images, LiDAR points or both, by rendering the volume that it predicts.

    python train.py --modality camera                               # no data, no GPU: a synthetic city, a tiny model
    python train.py --modality lidar                                # the same for a LiDAR encoder
    python train.py --modality fusion                               # both, into one volume
    python train.py --modality lidar --preset segment-tiny          # the sparse U-Net that segmentation starts from
    python train.py --modality camera --init convnext.pt --data-root /data/nuscenes --version v1.0-trainval
    torchrun --nproc-per-node 4 train.py --modality lidar --data-root /data/nuscenes --version v1.0-trainval
    python train.py --modality camera --steps 4 --device cpu        # a quick test of the installation
    python train.py --modality camera --preset camera-0.1 --help    # the settings of a recipe and their values
    python train.py --config outputs/train-camera/RUN --seed 1      # a run's settings again, with another seed
    python train.py --resume outputs/train-camera/RUN               # resume a run, with its settings

The first four commands take a few minutes on two CPU cores and end with pictures of what the model renders on frames
that it was not trained on. The paper's recipes (--preset camera-0.1 and lidar-0.075, the defaults with --data-root)
train for 12 epochs, with 4 and 16 samples per step.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

# Limits how long OpenMP's idle threads spin; must be set before torch loads OpenMP. If any other process runs on the
# machine, threads that spin delay others for milliseconds at a time. On two cores shared with another process, a step
# took 10 times as long as on an idle machine, with this limit 2.5 times; on an idle machine it makes a step 8 % slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from unipad.exit import end_at_once, exit_on_user_error

if __name__ == "__main__":
    end_at_once()  # on Ctrl-C during the imports

import torch
import tyro

from unipad import cli
from unipad.checkpoint import take_weights
from unipad.compile import compile_parts, uncompiled
from unipad.config import PretrainRecipe, UnetConfig
from unipad.data.dataset import DEFAULT_DATASET, dataset_class
from unipad.data.loader import held_out_batches, step_batches
from unipad.draw.scene3d import rendered_scene
from unipad.draw.views import rendered_views
from unipad.errors import UserError, check_ranges
from unipad.evaluate.rendering import evaluate_rendering
from unipad.model.pretrain import Pretrain
from unipad.model.rays import rays_per_sample
from unipad.optimizer import lr_factor_at, make_optimizer, set_rates
from unipad.progress import Progress, format_metrics
from unipad.recipes import DEFAULT_PRESET, PRETRAIN
from unipad.run_folder import RunFolder, find_run, resumed, run_config
from unipad.runtime import StopOnSignal, generators, local_gradients, mixed_precision, start


@dataclass(frozen=True)
class Args:
    modality: Literal["camera", "lidar", "fusion"] = "camera"  # input of the encoder
    preset: str | None = None  # a recipe of docs/recipes.md; None: tiny, or the paper's with --data-root
    backbone: Literal["tiny", "small", "base", "large"] | None = None  # ConvNeXt size; None: the recipe's
    config: Path | None = None  # take all settings from this run or config.json; other flags override them
    resume: str = "never"  # a run's folder: resume it with its settings; auto: the run in --out, or the newest
    data_root: Path | None = None  # folder of the dataset; None: a synthetic city, generated in data/synthetic
    version: str | None = None  # version of the dataset, such as v1.0-trainval; None: its default, v1.0-mini
    dataset: str = DEFAULT_DATASET  # package.module:Class of another dataset; see unipad/data/dataset.py
    label_fraction: float = 1.0  # fraction 1/k of the training frames to use: every k-th one
    out: Path | None = None  # run folder; None: outputs/train-<modality, or segment>/<time>
    init: tuple[Path, ...] = ()  # runs or checkpoints to take encoders from; for fusion, a camera and a LiDAR one
    seed: int = 0  # seed of weights, sample order, masks and rays
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
    val_every: int | None = None  # steps between validations; None: a third of the run; 0: no validation
    val_samples: int = 12  # held-out frames that a validation renders
    picture_stride: int = 2  # spacing of the rays of a validation picture, pixels; of its 3D view: half this, degrees
    save_every: int | None = None  # steps between checkpoints; None: a twentieth of the run, at most 1000
    recipe: Annotated[PretrainRecipe | None, tyro.conf.arg(name="")] = None  # the preset's, as changed by flags


def parse(argv=None) -> Args:
    def choose(args):  # the flags of an earlier run (--config, --resume), or these with their preset's recipe
        return cli.args_of_run(args) or cli.with_preset(args, PRETRAIN, args.modality, DEFAULT_PRESET[args.modality])

    args = cli.parse(Args, choose, __doc__, argv)
    above_0 = ("steps", "stop_at", "accumulate", "log_every", "val_samples", "picture_stride", "save_every")
    above_0 += ("recipe.optim.epochs", "recipe.optim.batch_size", "recipe.optim.lr", "recipe.rays.per_view")
    check_ranges(args, above_0, not_below_0=("workers", "seed", "val_every", "recipe.render.rgb_weight"))
    cli.check_recipe(args.recipe)
    return args


def main(args: Args):
    recipe, optim = args.recipe, args.recipe.optim
    with start(args.device, args.deterministic) as world:
        device, print0 = world.device, world.print0
        # in the name of the run's folder; a `UnetConfig` is the encoder for segmentation
        kind = "segment" if isinstance(recipe.lidar, UnetConfig) else args.modality
        path, saved = find_run(f"train-{kind}", args.out, args.resume, world)  # saved: the checkpoint to resume from
        if not saved:
            cli.check_frozen_stages(recipe, args.init, "--init")

        # Data
        args, train_set, val_set = open_datasets(args, world)
        recipe = args.recipe
        steps = args.steps or max(1, round(optim.epochs * len(train_set) / optim.batch_size))
        micro_batch = world.micro_batch(optim.batch_size, args.accumulate)

        # Model and optimizer
        torch.manual_seed(args.seed)
        net = Pretrain(recipe).to(device)
        net.encoder.set_checkpointing(args.checkpointing)
        if not saved:
            take_weights(net, "encoder.", args.init, "--init", print0)
        if args.compile:
            compile_parts(net, world)
        # DistributedDataParallel broadcasts the main process's weights
        model = torch.nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
        optimizer = make_optimizer(net, optim)
        autocast, scaler = mixed_precision(args.precision, device)

        # Run
        run = RunFolder(path, run_config(args, steps, train_set.contents(), saved), world, saved)
        if args.tune:
            run.tune()
        parts = {"model": net, "optimizer": optimizer, "scaler": scaler}
        # first: steps done already; metrics: {"before": metrics before training, "after": those of the last validation}
        first, metrics = resumed(saved, parts)
        last = min(steps, args.stop_at or steps)
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        print0(f"{path}: {len(train_set)} frames, {millions:.1f} M weights, steps {first} to {last}, {device}")

        # Loop
        val_every = math.ceil(steps / 3) if args.val_every is None else args.val_every
        save_every = args.save_every or min(1000, math.ceil(steps / 20))
        # The samples of a step, their order and all random numbers depend only on (seed, step), so none of it is saved.
        batches = step_batches(
            train_set,
            micro_batch,
            start=first * args.accumulate,  # counted in micro-batches
            seed=args.seed,
            rank=world.rank,
            world=world.size,
            workers=world.workers(args.workers),
            pinned=device.type == "cuda",
        )
        stop = StopOnSignal(world)
        progress = Progress(run, world, first, last, steps, optim.batch_size)

        # step: steps done so far; after the last one there is only a validation
        for step in range(first, last + 1):
            if val_every and (step % val_every == 0 or step == last) and step > run.last_validated_step:
                # at once: a signal need not wait for the end of the validation, since this step is saved
                with run.validation(step, parts, metrics), stop.at_once(), autocast, uncompiled(args.compile):
                    metrics["after" if step else "before"] = validate(net, val_set, run, args, world, step)
                progress.restart(step)  # the speed of the next report is without the validation
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
                        losses, rays_missed = model(batch.to(device), rngs)  # rays_missed: a fraction of the rays
                    loss = sum(losses.values())
                    scaler.scale(loss / args.accumulate).backward()
                for name, value in {"loss": loss, **losses, "rays_missed": rays_missed}.items():
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
            # Only here, in `backend.host_wait` and in fp16's scaler does the host wait for the GPU.
            if report_now or save_now:
                values = progress.checked_means(values, scaler, done)
            if report_now:
                rays = rays_per_sample(batch.keyframe(), recipe.rays) if recipe.render.renders else 0
                progress.report(done, values, lr=optim.lr * lr_factor_at(optim, step, steps), rays_per_sample=rays)
            if save_now:
                run.save(done, parts, metrics)
            if stop_now:
                stop.end(f"stopped after step {done}, saved; resume with --resume {path}")

        progress.sum_up()
        print0(summary(metrics, path))


def open_datasets(args, world):
    """(args, training set, validation set); in args, the dataset's folder and version and the rays' origin are set."""
    recipe = args.recipe
    dataset = dataset_class(args.dataset)
    version = args.version or dataset.default_version
    point_range = (recipe.grid.low, recipe.grid.high)  # no ray is sampled outside: points there are no depth targets
    with world.main_first():  # generates the city, builds the index
        root = Path(os.path.expanduser(args.data_root or dataset.default_root(recipe.data)))
        if recipe.camera is None:
            split, _ = dataset.train_val_splits(root, version)
            recipe = with_ray_origins(recipe, dataset.has_images(root, version, split), world.print0)
        train_set, val_set = dataset.train_and_val(root, version, recipe, args.label_fraction, point_range)
        recipe = replace(recipe, data=train_set.data)  # with the number of feature channels
    return replace(args, data_root=root.resolve(), version=version, recipe=recipe), train_set, val_set


def with_ray_origins(recipe, has_images, print0):
    """A LiDAR recipe adapted to the dataset: without images, rays start at the LiDAR.

    Raises `UserError` if the recipe has a loss of colors or image features then, since these rays see no pixel.
    """
    if recipe.data.cameras and has_images:
        return recipe
    losses = [name for name in ("rgb", "photometric", "features") if getattr(recipe.render, f"{name}_weight")]
    if losses:
        flags = [f"--render.{name}-weight 0" for name in losses]
        flags += ["--data.sources"] if "photometric" in losses else []  # without a number: none
        flags += ["--data.features None"] if "features" in losses else []
        raise UserError(f"rays cast from the LiDAR see no pixels, which some losses need: add {' '.join(flags)}.")
    if recipe.data.cameras:
        print0("no training frame has all its images: rays are cast from the LiDAR")
    return replace(recipe, data=replace(recipe.data, cameras=False))


def validate(net, val_set, run, args, world, step):
    """Render held-out frames: returns the metrics, and logs them with a picture and a 3D view."""
    frames = held_out_batches(val_set, args.val_samples, world.rank, world.size)
    metrics = evaluate_rendering(net, frames, args.seed, world.device)
    if world.is_main:
        _, frame = next(held_out_batches(val_set, 1))
        frame = frame.to(world.device)
        # picture and 3D view each get new generators of the same state: so both have the same mask, at every validation
        rngs = generators(args.seed, step=0, positions=[0], device=world.device)
        run.picture("val", rendered_views(net, frame, rngs, args.picture_stride), step)
        rngs = generators(args.seed, step=0, positions=[0], device=world.device)
        run.scene("val", rendered_scene(net, frame, rngs, stride=max(1, args.picture_stride // 2)), step)
    run.scalars({f"val/{name}": value for name, value in metrics.items()}, step)
    world.print0(f"step {step}/{run.config['steps']}  held-out frames: {format_metrics(metrics)}")
    return metrics


def summary(metrics, path):
    """Metrics before and after training, and where the results are, as text."""
    lines = []
    if metrics:
        lines += [f"{'held-out frames':<20}" + "".join(f"{when:>10}" for when in metrics)]
        first, *others = metrics.values()
        # the files of a resumed run may have changed, and with them what can be measured
        for name in (name for name in first if all(name in values for values in others)):
            lines += [f"{name:<20}" + "".join(f"{values[name]:>10.3f}" for values in metrics.values())]
        lines += [f"pictures     {path / 'images'}"]
    lines += [f"checkpoint   {path / 'checkpoints' / 'last.pt'}"]
    return "\n".join([*lines, f"curves       tensorboard --logdir {path.parent}"])


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse())
