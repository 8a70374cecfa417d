"""How good a model is: PSNR of rendered colours and error of the depths, or NDS and mAP of detected boxes."""

import sys

import torch
from tqdm import tqdm

from unipad.data.loader import all_batches
from unipad.errors import UserError
from unipad.model.detect import Detections
from unipad.model.rays import lidar_rays, pixel_rays
from unipad.runtime import all_reduce_sum, from_main, generators, to_main
from unipad.submission import headline, score_submission, write_submission

RAYS_PER_VIEW = 256  # LiDAR rays a view that depth is judged on
PIXEL_STRIDE = 8  # pixels between the rays that colour is judged on


@torch.no_grad()
def evaluate_rendering(model, batches, seed, device, masked=True):
    """Render held-out frames and compare them with their images and LiDAR points.

    model:   a `Pretrain`; put in eval mode here and back into the mode it was in.
    batches: iterable of (position, Batch): the position seeds the masks and the choice of LiDAR rays,
        so every evaluation of a run sees the same.
    masked:  hide from the encoder what training hides.

    Returns dict: psnr (dB, over a grid of pixels; not where colour is not learned or there are no images),
    depth_abs_rel, depth_rmse (metres), depth_delta1 (share of rays within a factor 1.25). LiDAR depths are the truth;
    a ray that misses the volume counts as black at depth 0. Sums run over all processes.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    for position, batch in batches:
        batch = batch.to(device)
        draws = generators(seed, 0, range(position, position + len(batch)), device)
        volume, _ = model.encode(batch, draws if masked else None)
        for i in range(len(batch) if in_colour(model, batch) else 0):
            rays, _ = pixel_rays(batch, i, PIXEL_STRIDE)
            rgb, _ = model.render(volume, rays)
            sums[0] += (rgb - rays.rgb).square().mean(1).double().sum()
            sums[1] += len(rays)
        rays = lidar_rays(batch, model.recipe.rays, RAYS_PER_VIEW, draws)
        _, depth = model.render(volume, rays)
        sums[2:] += _depth_sums(depth, rays.depth)
    model.train(was_training)
    squared, pixels, abs_rel, squared_m, close, depths = all_reduce_sum(sums).tolist()
    if not depths:
        raise UserError("none of these frames has a LiDAR point in view: take more frames.")
    psnr = {"psnr": -10 * torch.tensor(squared / pixels).log10().item()} if pixels else {}
    return psnr | {
        "depth_abs_rel": abs_rel / depths,
        "depth_rmse": (squared_m / depths) ** 0.5,
        "depth_delta1": close / depths,
    }


def in_colour(model, batch):
    """Whether the model learns colours and the batch shows some."""
    return model.recipe.render.rgb_weight > 0 and batch.images.shape[1] > 0


def _depth_sums(depth, truth):
    """[4] sums over rays with a truth: |error| / truth, error^2, within a factor 1.25, count."""
    known = truth > 0
    truth = torch.where(known, truth, 1.0).double()
    depth = torch.where(known, depth.double(), truth)
    ratio = torch.maximum(depth / truth, truth / depth.clamp(min=1e-6))
    per_ray = [(depth - truth).abs() / truth, (depth - truth).square(), (ratio < 1.25) & known, known]
    return torch.stack([p.double().sum() for p in per_ray])


def evaluate_detections(model, dataset, folder, world, detect=None, size=1, workers=0):
    """Detect in every frame of a split and let the devkit judge.

    model, dataset, world, detect, size, workers: as for `detect_all`.
    folder: gets `results_nusc.json` and `metrics_summary.json` (the devkit's, see `submission.table`).

    Returns dict: NDS, mAP, mATE (metres), mASE, mAOE (radians), mAVE (m/s), mAAE; the same in every process. A frame
    that cannot be read counts as one in which nothing was found.
    """
    found = detect_all(model, dataset, world, detect, size, workers)
    metrics = None
    if world.is_main:
        file = submit(found, model.recipe, dataset, folder)
        metrics = headline(score_submission(file, dataset.root, dataset.version, dataset.split))
    return from_main(metrics, world)


def submit(found, recipe, dataset, folder):
    """Write what `detect_all` found to folder/results_nusc.json; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results_nusc.json"
    write_submission(found, dataset.index, file, recipe.camera is not None, recipe.lidar is not None)
    return file


@torch.no_grad()
def detect_all(model, dataset, world, detect=None, size=1, workers=0):
    """What a model finds in every frame of a dataset: {sample token: `Detections` on the host} in the main process,
    None in the others.

    model:   a `Detector`; put in eval mode here and back into the mode it was in.
    dataset: a `NuScenesDataset` of all the split's frames.
    world:   `runtime.World`; each process takes every world-th frame.
    detect:  function of a batch instead of `model.detect`, such as `tta.detect_in_looks` makes.
    size:    samples of a batch; workers: processes that load, for each process.

    A frame that cannot be read is named on stderr and missing in the result. Raises `UserError` if all are.
    """
    was_training = model.training
    model.eval()
    found, unreadable = {}, []
    pinned = world.device.type == "cuda"
    silent = None if world.is_main else True  # None: where nobody watches
    with tqdm(total=len(dataset), desc="detecting", unit="frame", leave=False, disable=silent) as bar:
        for batch, bad_frames in all_batches(dataset, size, world.rank, world.size, workers, pinned):
            unreadable += bad_frames
            if batch is not None:
                for token, one in zip(batch.tokens, (detect or model.detect)(batch.to(world.device)), strict=True):
                    found[token] = Detections(one.boxes.float().cpu(), one.scores.float().cpu(), one.labels.cpu())
            bar.update(size * world.size)
    model.train(was_training)
    for frame in unreadable:
        print(f"skipped {frame}", file=sys.stderr)
    parts = to_main((found, unreadable), world)
    if parts is None:
        return None
    found = {token: one for part, _ in parts for token, one in part.items()}
    if not found:
        reasons = [frame for _, bad_frames in parts for frame in bad_frames]
        raise UserError(f"none of the {len(dataset)} frames can be read ({reasons[0]}); unpack the set's files there.")
    return found
