"""What predictions that look at no input score on validation frames: the least that a trained model should reach.

    python -m benchmarks.best_constant                          # voxels' classes, on the synthetic city
    python -m benchmarks.best_constant --target features        # features of pixels, on the city with features
    python -m benchmarks.best_constant --target depth           # depths of rendered rays
    python -m benchmarks.best_constant --data-root /data/nuscenes --version v1.0-trainval --no-rays

occupancy: every frame gets the same classes: all voxels free, or the class that is most frequent in the training
frames, among the voxels that cameras see, at a height or in a voxel (free where no camera has seen it). Metrics are
those of eval.py.

features: every pixel gets the same vector, the one with the highest mean cosine similarity to the pixels of the
training frames, or to those of the validation frames themselves, which no model knows. Frames and pixels are those that
a validation of train.py measures.

depth: every ray gets the same depth, the one with the lowest AbsRel over the rays of the training frames, or over those
of the validation frames themselves. Frames are those of a validation of train.py, and rays are drawn as there.
"""

import sys
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from unipad.batch import FREE, OCCUPANCY_CLASSES, OCCUPANCY_SHAPE, Batch
from unipad.config import Data
from unipad.data.dataset import DataError
from unipad.data.loader import all_batches, held_out_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.evaluate.occupancy import count, headline, summarize
from unipad.evaluate.rendering import PIXEL_STRIDE, RAYS_PER_VIEW, depth_sums
from unipad.exit import exit_on_user_error
from unipad.model.rays import cast_rays, grid_of_views, lidar_rays
from unipad.recipes import PRETRAIN
from unipad.runtime import generators


@dataclass(frozen=True)
class Args:
    target: Literal["occupancy", "features", "depth"] = "occupancy"  # what is predicted
    data_root: Path | None = None  # folder of a dataset in the nuScenes format; None: a synthetic city
    version: str = "v1.0-mini"  # its version
    rays: bool = True  # occupancy: RayIoU too, which takes most of the time
    frames: int = 12  # features, depth: validation frames, spread over the split; train.py has as many


def readable(dataset):
    """Yield `Batch`es of one frame each, of all frames that can be read; the others are named."""
    for batch, bad_frames in all_batches(dataset):
        for bad in bad_frames:
            print(f"skipped {bad}", file=sys.stderr)
        if batch is not None:
            yield batch.to("cpu")


def class_counts(labels: Tensor, counts: Tensor) -> Tensor:
    """Add a frame's labels [3, X, Y, Z], as in `Batch`, to `counts` [X * Y * Z, classes] int32 of its seen voxels."""
    classes, _, seen = labels.flatten(1).long()
    voxel = seen.nonzero()[:, 0]
    counts[voxel, classes[voxel]] += 1  # no voxel occurs twice
    return counts


def constants(counts: Tensor) -> dict[str, Tensor]:
    """{name: classes [X, Y, Z] uint8} of `class_counts`."""

    def most_frequent(counts):
        return counts.argmax(dim=-1).where(counts.sum(dim=-1) > 0, FREE).to(torch.uint8)

    of_voxel = counts.view(*OCCUPANCY_SHAPE, len(OCCUPANCY_CLASSES))
    return {
        "free": torch.full(OCCUPANCY_SHAPE, FREE, dtype=torch.uint8),
        "most frequent class of each height": most_frequent(of_voxel.sum(dim=(0, 1))).expand(OCCUPANCY_SHAPE),
        "most frequent class of each voxel": most_frequent(of_voxel),
    }


def occupancy(args: Args) -> list[str]:
    """The table of constant occupancy."""
    data = Data(cameras=False)
    root = args.data_root or NuScenesDataset.default_root(data)
    splits = NuScenesDataset.train_val_splits(root, args.version)
    train_set, val_set = (NuScenesDataset(root, args.version, split, data).with_occupancy() for split in splits)
    counts = torch.zeros(int(np.prod(OCCUPANCY_SHAPE)), len(OCCUPANCY_CLASSES), dtype=torch.int32)
    for batch in readable(train_set):
        class_counts(batch.occupancy[0], counts)
    predictions, scores = constants(counts), {}
    origins = val_set.lidar_origins() if args.rays else {}
    for batch in readable(val_set):
        for name, classes in predictions.items():
            one = count(classes, batch.occupancy[0], origins.get(batch.tokens[0]))
            scores.setdefault(name, []).append(one)
    metrics = {name: headline(summarize(of_frames)) for name, of_frames in scores.items()}
    if not metrics:
        raise DataError(f"{root} {args.version}: no frame of {val_set.split} can be read.")
    return table(f"constant, on {val_set.split}", metrics)


def unit_features(batch: Batch) -> Tensor:
    """Of a batch of one, the features of the pixels that a validation measures, [P, F] of length 1."""
    pixels, inside, _ = grid_of_views(batch, 0, PIXEL_STRIDE)
    features = cast_rays(batch, 0, pixels)[inside.flatten()].features
    return F.normalize(features[features.any(dim=1)].double(), dim=1)


def features(args: Args) -> list[str]:
    """The table of constant features."""
    recipe = PRETRAIN["camera"]["features-tiny"]
    recipe = replace(recipe, data=replace(recipe.data, feature_channels=0))  # as many as there are
    root = args.data_root or NuScenesDataset.default_root(recipe.data)
    train_set, val_set = NuScenesDataset.train_and_val(root, args.version, recipe, 1.0, None)
    found = [unit_features(batch.to("cpu")) for _, batch in held_out_batches(val_set, args.frames)]
    held_out = torch.cat(found).mean(dim=0)  # its product with a unit vector is the mean cosine similarity to it
    learned = reduce(add, (unit_features(batch).sum(dim=0) for batch in readable(train_set)))
    vectors = {"best of the training frames": learned, "best of these frames": held_out}
    metrics = {name: {"features_cosine": (F.normalize(v, dim=0) @ held_out).item()} for name, v in vectors.items()}
    return table(f"constant, on {len(found)} frames of {val_set.split}", metrics)


def least_relative_error(truth: Tensor) -> Tensor:
    """The constant c with the least mean of |c - d| / d over depths d [R]: their median, weighted by 1 / d."""
    truth = truth.sort().values
    share = (1 / truth).cumsum(dim=0)
    return truth[(share < share[-1] / 2).sum()]


def depth(args: Args) -> list[str]:
    """The table of constant depths."""
    recipe = PRETRAIN["camera"]["tiny"]
    root = args.data_root or NuScenesDataset.default_root(recipe.data)
    box = recipe.grid.low, recipe.grid.high
    train_set, val_set = NuScenesDataset.train_and_val(root, args.version, recipe, 1.0, box)

    def of(batches):
        depths = []
        for position, batch in batches:
            rngs = generators(seed=0, step=0, positions=[position], device=torch.device("cpu"))
            depths.append(lidar_rays(batch, recipe.rays, RAYS_PER_VIEW, rngs).depth)
        depths = torch.cat(depths).double()
        return depths[depths > 0]

    held_out = of((position, batch.to("cpu")) for position, batch in held_out_batches(val_set, args.frames))
    metrics = {}
    for name, depths in (("training", of(enumerate(readable(train_set)))), ("these", held_out)):
        best = least_relative_error(depths)
        abs_rel, _, close, rays = depth_sums(torch.full_like(held_out, best), held_out).tolist()
        metrics[f"best of {name} frames"] = dict(depth=best.item(), abs_rel=abs_rel / rays, delta1=close / rays)
    return table(f"constant, on {args.frames} frames of {val_set.split}", metrics)


def table(title, metrics):
    """Lines of a table: a row for each constant."""
    names = list(next(iter(metrics.values())))
    lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(f'{of[n]:.4f}' for n in names)} |" for name, of in metrics.items()]


def main(args: Args):
    print("\n".join({"occupancy": occupancy, "features": features, "depth": depth}[args.target](args)))


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Args, description=__doc__))
