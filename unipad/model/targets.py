"""Hungarian assignment and detection losses, for all layers of the decoder at once.

Boxes and labels of all samples are concatenated, as in `Batch`; `counts` is a list of ints, the number of boxes of each
sample, which may be 0. A box is encoded as a code of 10 numbers (see `unipad.boxes`).

Sizes: L decoder layers, B samples, Q queries, K classes; M boxes, of which sample b has n_b.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unipad.boxes import decode_boxes, encode_boxes
from unipad.config import Detect, Grid
from unipad.kernels.backend import host_wait
from unipad.kernels.rotated_iou import paired_iou_3d

COMPARED = 8  # the assignment compares this many entries of codes, from the first on: all but the velocity
LARGE_COST = 1e8  # replaces NaN and inf among the costs, as of boxes without a size; -LARGE_COST replaces -inf


@dataclass(frozen=True)
class Noisy:
    """Ground truth with noise, as queries that learn to reconstruct it (denoising, arXiv 2203.01305).

    Each sample has G groups of P slots, P = largest n_b; sample b uses the first n_b of each group.
    """

    references: Tensor  # [B, G * P, 3] centers as fractions of the grid's range, in [0, 1]; 0 in unused slots
    # A noisy query attends to its own group and to the head's own Q queries; these attend to each other only.
    blocked: Tensor  # [G * P + Q, G * P + Q] bool, True: the row's query does not attend to the column's
    sample: Tensor  # [M] int64 index of each box's sample
    slot: Tensor  # [G, M] int64 index of each box's noisy query in each group, in [0, G * P)
    boxes: Tensor  # [M, 9] without noise
    labels: Tensor  # [G, M] int64; where the noise is large, background: the number of classes, K

    def __len__(self) -> int:
        """Noisy queries per sample."""
        return self.references.shape[1]


def draw_noise(cfg: Detect, counts: list[int], generators: Sequence[torch.Generator]) -> Tensor:
    """[noise_groups, M, 3] uniform in [0, 1) for `noisy_queries`; a sample's noise does not depend on the others."""
    pairs = zip(counts, generators, strict=True)
    draws = [torch.rand(cfg.noise_groups, n, 3, generator=g, device=g.device) for n, g in pairs]
    return torch.cat(draws, dim=1)


def noisy_queries(cfg: Detect, grid: Grid, boxes: Tensor, labels: Tensor, counts: list[int], noise: Tensor) -> Noisy:
    """Ground truth with its centers shifted by at most `noise_scale` times half of w, l, h along x, y, z of the grid,
    whatever the yaw (as in the original).

    Args:
        grid:   references are fractions of its range.
        boxes:  [M, 9]; labels: [M] int64; counts: B ints.
        noise:  [noise_groups, M, 3] uniform in [0, 1); the last groups are not used if a sample has many boxes.
    """
    sample, index = _sample_and_index(counts, boxes.device)
    P = max(counts, default=0)
    G = min(cfg.noise_groups, cfg.queries // P) if P else 0  # at most as many noisy queries as others
    low, high = tensor_like(grid.low, boxes), tensor_like(grid.high, boxes)
    shift = noise[:G] * 2 - 1  # [G, M, 3]
    center = boxes[:, :3] + shift * (cfg.noise_scale / 2) * boxes[:, 3:6]
    slot = index + P * torch.arange(G, device=boxes.device)[:, None]  # [G, M]
    references = boxes.new_zeros(len(counts), G * P, 3)
    references[sample.expand_as(slot), slot] = ((center - low) / (high - low)).clamp(0, 1)

    group = torch.arange(G, device=boxes.device).repeat_interleave(P)
    group = F.pad(group, (0, cfg.queries), value=-1)  # [G * P + Q], -1: the head's own queries
    blocked = (group[:, None] != group) & (group >= 0)
    labels = torch.where(shift.norm(dim=-1) > cfg.noise_split, cfg.classes, labels)
    return Noisy(references, blocked, sample, slot, boxes, labels)


@torch.no_grad()
def assign(
    cfg: Detect, logits: Tensor, codes: Tensor, boxes: Tensor, labels: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one assignment of boxes to queries of lowest total cost, per layer and sample (Hungarian method).

    cost = class_weight * (focal loss of the box's class with target 1, minus that with target 0)
           + box_weight * |weighted code - box's weighted code|_1, without the velocities

    Args:
        logits: [L, B, Q, K]; codes: [L, B, Q, 10].
        boxes:  [M, 9]; labels: [M]; counts: B ints.

    Returns (sample [N], query [L, N], box [L, N]) int64, on the device of `logits`: the assigned queries and their rows
    of `boxes`; N = sum over samples of min(Q, n_b).
    """
    L, B, Q, _ = logits.shape
    cost = assignment_cost(cfg, logits, codes, boxes, labels, counts)
    # scipy rejects NaN. Where predictions are NaN, so is the loss, which the training loop handles.
    with host_wait("assignment costs for the Hungarian method"):
        cost = cost.cpu().numpy()
    cost = np.nan_to_num(cost, nan=LARGE_COST, posinf=LARGE_COST, neginf=-LARGE_COST)
    matches = [np.zeros((2, L, 0), np.int64)]  # per sample [2 (query, box), L, min(Q, n)]
    first = 0
    for b, n in enumerate(counts):
        pairs = np.array([linear_sum_assignment(cost[l, b, :, :n]) for l in range(L)], np.int64)  # [L, 2, min(Q, n)]
        pairs[:, 1] += first
        matches.append(pairs.transpose(1, 0, 2))
        first += n
    sample = np.repeat(np.arange(B), [min(Q, n) for n in counts])
    query, box = np.concatenate(matches, axis=2)
    return tuple(torch.from_numpy(t).to(logits.device, non_blocking=True) for t in (sample, query, box))


def assignment_cost(
    cfg: Detect, logits: Tensor, codes: Tensor, boxes: Tensor, labels: Tensor, counts: list[int]
) -> Tensor:
    """[L, B, Q, P] cost of assigning each box of a sample to each query; P = largest n_b. Of sample b, only the first
    n_b columns count."""
    sample, index = _sample_and_index(counts, boxes.device)
    P = max(counts, default=0)
    box_label = labels.new_zeros(len(counts), P)
    target = codes.new_zeros(len(counts), P, COMPARED)
    box_label[sample, index] = labels
    target[sample, index] = encode_boxes(boxes)[:, :COMPARED]

    prob = logits.sigmoid()
    present = -(prob + 1e-12).log() * cfg.focal_alpha * (1 - prob) ** cfg.focal_gamma
    absent = -(1 - prob + 1e-12).log() * (1 - cfg.focal_alpha) * prob**cfg.focal_gamma
    class_cost = present - absent  # [L, B, Q, K]
    class_cost = class_cost.gather(-1, box_label[None, :, None].expand(*class_cost.shape[:3], P))  # [L, B, Q, P]
    weights = tensor_like(cfg.code_weights[:COMPARED], codes)
    code_cost = torch.cdist(codes[..., :COMPARED] * weights, target * weights, p=1)
    return cfg.class_weight * class_cost + cfg.box_weight * code_cost


def detection_losses(
    cfg: Detect, predictions, noisy_predictions, noisy: Noisy | None, boxes: Tensor, labels: Tensor, counts: list[int]
) -> dict[str, Tensor]:
    """The head's losses.

    Args:
        predictions:       `detect.Predictions` of the queries.
        noisy_predictions: those of the noisy ground truth `noisy`; both are None in a head without denoising.
        boxes:             [M, 9]; labels: [M]; counts: B ints.

    Returns name -> [L] weighted loss of each layer, summed over queries:
        class        focal loss of all queries, per assigned box
        box          |code - box's code|, weighted per entry, of assigned queries, per assigned box
        iou          |prediction - (2 IoU - 1)| of assigned queries whose predicted box overlaps the true one, per such
                     query; only if the head predicts IoUs
        noisy_*      the same for the noisy queries; `noisy_class` per expected foreground query, `noisy_box` per query
    The divisors of `class`, `box` and `noisy_box` are means over all processes, those of the others count in this
    process. Without boxes the losses of box and IoU are 0, with a gradient of 0 (not None) for every weight.
    """
    sample, query, box = assign(cfg, predictions.logits, predictions.codes, boxes, labels, counts)
    layer = torch.arange(len(query), device=query.device)[:, None]  # [L, 1]
    target_class = torch.full(predictions.logits.shape[:3], cfg.classes, device=labels.device)  # [L, B, Q]
    target_class[layer, sample, query] = labels[box]
    numbers = [query.shape[1]] if noisy is None else [query.shape[1], noisy.slot.numel()]
    divisors = _mean_over_processes(numbers, boxes).clamp(min=1)  # assigned queries, noisy queries

    losses = {"class": cfg.class_weight * _focal(cfg, predictions.logits, target_class).sum(dim=(1, 2)) / divisors[0]}
    losses |= _box_losses(cfg, predictions, (layer, sample, query), boxes[box], divisors[0])
    if noisy is not None:
        sample, slot = noisy.sample.repeat(len(noisy.slot)), noisy.slot.flatten()  # [G * M]
        # Expected number of foreground queries, i.e. those whose `shift` (see `noisy_queries`), uniform in a cube of
        # edge 2, lies in the ball of radius `noise_split`, which is pi / 6 * noise_split^3 of the cube's volume.
        foreground = max(noisy.slot.numel() * math.pi / 6 * cfg.noise_split**3, 1.0)
        logits, target_class = noisy_predictions.logits[:, sample, slot], noisy.labels.flatten().expand(len(layer), -1)
        terms = {"class": cfg.class_weight * _focal(cfg, logits, target_class).sum(dim=1) / foreground}
        truth = noisy.boxes.repeat(len(noisy.slot), 1)
        terms |= _box_losses(cfg, noisy_predictions, (layer, sample, slot), truth, divisors[1])
        losses |= {f"noisy_{name}": cfg.noise_weight * value for name, value in terms.items()}
    return losses


def _focal(cfg, logits, target_class):
    """Focal loss (arXiv 1708.02002) of logits [..., K] for classes [...] (K: background), summed over logits."""
    truth = (target_class[..., None] == torch.arange(cfg.classes, device=target_class.device)).to(logits.dtype)
    prob = logits.sigmoid()
    wrong = truth * (1 - prob) + (1 - truth) * prob
    weight = (truth * cfg.focal_alpha + (1 - truth) * (1 - cfg.focal_alpha)) * wrong**cfg.focal_gamma
    return (weight * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")).sum(dim=-1)


def _box_losses(cfg, predictions, at, boxes, divisor):
    """Losses of codes and IoUs of the predictions `at` (layer, sample, query) for boxes [L, N, 9] or [N, 9].

    divisor: of the loss of the codes; that of the IoUs is a mean over the predictions that overlap their box.
    """
    codes = predictions.codes[at]  # [L, N, 10]
    target = encode_boxes(boxes).expand_as(codes)
    # boxes without a size or with an unknown (NaN) velocity add nothing to the losses
    known = target.isfinite().all(dim=-1, keepdim=True)
    error = (codes - torch.where(known, target, 0)).abs() * known
    losses = {"box": cfg.box_weight * (error * tensor_like(cfg.code_weights, codes)).sum(dim=(1, 2)) / divisor}
    if predictions.iou is not None:
        predicted = decode_boxes(codes.detach())[..., :7]
        with torch.no_grad():
            overlap = paired_iou_3d(predicted.flatten(0, 1), boxes[..., :7].expand_as(predicted).flatten(0, 1))
        overlap = overlap.view(codes.shape[:2])  # [L, N]
        hits = (overlap > 0) & known[..., 0]  # False also where a predicted size overflows
        error = (predictions.iou[at] - (2 * torch.where(hits, overlap, 0) - 1)).abs() * hits
        losses["iou"] = cfg.iou_weight * error.sum(dim=1) / hits.sum(dim=1).clamp(min=1)
    return losses


def _sample_and_index(counts, device):
    """(sample, index within the sample) of each of the concatenated boxes, [M] int64 each."""
    sample = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    index = torch.cat([torch.arange(n) for n in counts])
    return sample.to(device, non_blocking=True), index.to(device, non_blocking=True)


def tensor_like(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor with the dtype and device of `like`, without the host wait of `new_tensor`."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def _mean_over_processes(numbers, like):
    """The means of `numbers` over all processes, [len(numbers)] with the dtype and device of `like`."""
    mean = tensor_like(numbers, like)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean
