"""UVTR's detection heads (arXiv 2206.00630): queries search the volume for boxes, with or without denoising.

                  plain (UVTR)                          denoising (UVTR-DN)
queries start     with learned features and positions,  with zero features and learned references,
                  references computed from positions    positions computed from references
also trained on   -                                     noisy queries: ground truth boxes with shifted centers
predicts          class and box                         class, box and IoU with the true box
score             p, the probability of the class       sqrt(p * IoU), or p if the recipe says so

A position is a query's positional embedding, a reference the point of the volume that it reads (see decoder.py).

The recipe decides which classes rotated NMS applies to.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unipad.batch import Batch
from unipad.boxes import CODE_SIZE, decode_boxes, footprint
from unipad.config import Detect, DetectRecipe, Grid, LidarConfig
from unipad.kernels.rotated_iou import rotated_nms
from unipad.model.decoder import DecoderLayer, sample_volume
from unipad.model.depth import depth_loss
from unipad.model.dropout import Dropout
from unipad.model.encoder import Encoder
from unipad.model.targets import Noisy, detection_losses, draw_noise, noisy_queries, tensor_like

EPS = 1e-5  # fractions of the grid's range are clamped this far from 0 and 1 before taking logits, as in mmdet
PRIOR = 0.01  # initial score of every class (focal loss, arXiv 1708.02002)


@dataclass(frozen=True)
class Predictions:
    """Predictions of L decoder layers for Q queries in B samples and K classes."""

    logits: Tensor  # [L, B, Q, K] of the classes
    codes: Tensor  # [L, B, Q, 10] as from `boxes.encode_boxes`
    iou: Tensor | None  # [L, B, Q] predicted 2 IoU - 1 with the true box; None: the head predicts none

    def split(self, n: int) -> tuple["Predictions", "Predictions"]:
        """(the first n queries, the others)."""
        tensors = (self.logits, self.codes, self.iou)
        first, others = ([None if t is None else t[:, :, part] for t in tensors] for part in (slice(n), slice(n, None)))
        return Predictions(*first), Predictions(*others)


@dataclass(frozen=True)
class Detections:
    """D boxes detected in one sample. The function `detections` sorts them by p, the best first, not by `scores`."""

    boxes: Tensor  # [D, 9] as in `Batch`
    scores: Tensor  # [D] in [0, 1]
    labels: Tensor  # [D] int64


class Detector(nn.Module):
    """The encoder and the head of one `config.DetectRecipe`: a batch to boxes."""

    def __init__(self, recipe: DetectRecipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        # nothing is masked here, so it gets no gradient
        if isinstance(recipe.lidar, LidarConfig) and recipe.lidar.learnable_token:
            self.encoder.lidar.mask_token.requires_grad_(False)
        self.head = Head(recipe.detect, recipe.grid, self.encoder.channels)

    def forward(self, batch: Batch, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Losses of one training step: name -> weighted value, those of `Head.losses` and `depth`.

        batch: on the model's device; generators: one per sample, on that device.
        """
        encoded = self.encoder.encode(batch, generators, masked=False)
        losses = self.head.losses(encoded.volume, batch.boxes, batch.labels, batch.box_counts, generators)
        camera = self.recipe.camera
        if camera is not None and camera.depth_weight > 0:
            losses["depth"] = depth_loss(encoded.depths, batch, camera)
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Detections]:
        """The boxes of each sample. Put the model in eval mode first."""
        volume, _ = self.encoder(batch, generators=None)
        predictions, _ = self.head(volume)
        return detections(self.head.cfg, predictions)


class Head(nn.Module):
    """The detection head of one `config.Detect`, for volumes of `channels` over one `config.Grid`.

    Computes in the parameters' dtype, even under autocast: bf16 resolves positions to decimeters only.
    """

    def __init__(self, cfg: Detect, grid: Grid, channels: int):
        super().__init__()
        self.cfg, self.grid = cfg, grid
        self.register_buffer("low", torch.tensor(grid.low), persistent=False)
        self.register_buffer("high", torch.tensor(grid.high), persistent=False)
        layers = [DecoderLayer(channels, cfg.heads, cfg.hidden, cfg.dropout) for _ in range(cfg.layers)]
        self.layers = nn.ModuleList(layers)
        self.cls_branches = _per_layer(cfg.layers, channels, cfg.classes, normed=True)
        self.reg_branches = _per_layer(cfg.layers, channels, CODE_SIZE)
        for branch in self.cls_branches:
            nn.init.constant_(branch[-1].bias, -math.log((1 - PRIOR) / PRIOR))
        if cfg.denoising:
            self.iou_branches = _per_layer(cfg.layers, channels, 1)
            self.reference_points = nn.Embedding(cfg.queries, 3)  # fractions of the grid's range
            nn.init.uniform_(self.reference_points.weight)
            self.query_embedding = nn.Sequential(
                nn.Linear(3, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels)
            )  # reference logits -> position  # fmt: skip
        else:
            self.query_embedding = nn.Embedding(cfg.queries, 2 * channels)  # position, feature
            self.reference_points = nn.Linear(channels, 3)  # position -> reference logits
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        volume: Tensor,
        noisy: Noisy | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[Predictions, Predictions | None]:
        """Search volumes for boxes.

        Args:
            volume:     [B, C, Z, Y, X] features over the grid, LiDAR frame; channels_last_3d saves a copy.
            noisy:      ground truth with noise as additional queries, to train a denoising head; or None.
            generators: one per sample, for dropout in training; None: no dropout.

        Returns (predictions of the queries, predictions of the noisy queries or None). Differentiable once.
        """
        with torch.autocast(volume.device.type, enabled=False):
            volume = volume.permute(0, 2, 3, 4, 1).contiguous()  # [B, Z, Y, X, C]
            x, position, reference = self._queries(len(volume), noisy)
            dropout = Dropout(self.cfg.dropout, generators if self.training else None)
            blocked = None if noisy is None else noisy.blocked
            logits, codes, ious = [], [], []
            for i, layer in enumerate(self.layers):
                masks, sampled = layer.masks(dropout, *x.shape[:2]), sample_volume(volume, reference)
                x = layer(x, position, reference, sampled, blocked, masks)
                raw = self.reg_branches[i](x)  # [B, Q, 10] codes of `unipad.boxes`: entries 0, 1 and 4 are x, y, z
                offset = torch.cat([raw[..., :2], raw[..., 4:5]], dim=-1)  # of x, y, z, to the reference, in logits
                center = self.low + (self.high - self.low) * (offset + self._anchor(reference)).sigmoid()
                codes.append(torch.cat([center[..., :2], raw[..., 2:4], center[..., 2:], raw[..., 5:]], dim=-1))
                logits.append(self.cls_branches[i](x))
                if self.cfg.denoising:
                    ious.append(self.iou_branches[i](x)[..., 0])
                reference = (reference + offset).detach()
            predictions = Predictions(torch.stack(logits), torch.stack(codes), torch.stack(ious) if ious else None)
        # noisy queries come first, their predictions are returned second
        return (predictions, None) if noisy is None else predictions.split(len(noisy))[::-1]

    def losses(
        self,
        volume: Tensor,
        boxes: Tensor,
        labels: Tensor,
        counts: Tensor,
        generators: Sequence[torch.Generator] | None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one training step.

        Args:
            volume:     as for `forward`.
            boxes:      [M, 9], labels [M], counts [B]: `boxes`, `labels`, `box_counts` of a `Batch`.
            generators: one per sample, for noise and dropout; None: no dropout, and a denoising head needs `noise`.
            noise:      [groups, M, 3] uniform in [0, 1) instead of drawn noise.

        Returns name -> weighted value, summed over the layers: class, box, in a denoising head also iou,
        noisy_class, noisy_box, noisy_iou; see `detection_losses`.
        """
        noisy, counts = None, counts.tolist()
        if self.cfg.denoising:
            noise = draw_noise(self.cfg, counts, generators) if noise is None else noise
            noisy = noisy_queries(self.cfg, self.grid, boxes, labels, counts, noise)
        predictions, noisy_predictions = self(volume, noisy, generators)
        with torch.autocast(volume.device.type, enabled=False):
            losses = detection_losses(self.cfg, predictions, noisy_predictions, noisy, boxes, labels, counts)
        return {name: per_layer.sum() for name, per_layer in losses.items()}

    def _queries(self, B, noisy):
        """Initial features [B, Q, C], positions [B, Q, C] and reference logits [B, Q, 3]; noisy queries come first."""
        if not self.cfg.denoising:
            position, x = self.query_embedding.weight.expand(B, -1, -1).chunk(2, dim=-1)
            return x, position, self.reference_points(position)
        fraction = self.reference_points.weight.expand(B, -1, -1)
        if noisy is not None:
            fraction = torch.cat([noisy.references, fraction], dim=1)
        reference = (fraction.clamp(min=EPS) / (1 - fraction).clamp(min=EPS)).log()
        position = self.query_embedding(reference)
        return torch.zeros_like(position), position, reference

    def _anchor(self, reference):
        """Reference logits to which offsets are added for predicted centers; in the plain head clamped, as by mmdet's
        `inverse_sigmoid`. References of the next layer are not clamped."""
        if self.cfg.denoising:
            return reference
        limit = math.log((1 - EPS) / EPS)
        return reference.clamp(-limit, limit)


def detections(cfg: Detect, predictions: Predictions) -> list[Detections]:
    """The boxes that the last layer predicts, per sample. Not differentiable; waits for the device.

    Of all (query, class) pairs, the `max_detections` with the highest p; of these, those inside `center_low` to
    `center_high`, with a score of at least `min_score`, and not suppressed by a higher-scored one of their class if
    `nms` has a threshold for it.
    """
    prob = predictions.logits[-1].detach().sigmoid().flatten(1)  # [B, Q * K]
    prob, pair = prob.topk(min(cfg.max_detections, prob.shape[1]))
    query, labels = pair // cfg.classes, pair % cfg.classes  # [B, max_detections] each
    boxes = decode_boxes(predictions.codes[-1].detach().gather(1, query[..., None].expand(-1, -1, CODE_SIZE)))
    scores = prob
    if predictions.iou is not None and cfg.iou_in_score:
        iou = ((predictions.iou[-1].detach() + 1) / 2).clamp(0, 1).gather(1, query)
        scores = prob.sqrt() * iou.sqrt()
    low, high = tensor_like(cfg.center_low, boxes), tensor_like(cfg.center_high, boxes)
    valid = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(dim=-1) & (scores >= cfg.min_score)
    results = []
    for b in range(len(boxes)):
        candidates = Detections(*(t[b, valid[b]] for t in (boxes, scores, labels)))
        results.append(suppress(candidates, cfg.nms))
    return results


def suppress(detections: Detections, nms: Iterable[tuple[int, float]]) -> Detections:
    """Rotated NMS: `detections` without boxes that overlap a higher-scored one of their class.

    nms: pairs (class, largest bird's-eye IoU allowed); a class without a pair keeps all its boxes.
    """
    keep = torch.ones_like(detections.scores, dtype=torch.bool)
    for label, threshold in nms:
        rows = (detections.labels == label).nonzero()[:, 0]
        best = rotated_nms(footprint(detections.boxes[rows]), detections.scores[rows], threshold)
        keep[rows] = False
        keep[rows[best]] = True
    return Detections(detections.boxes[keep], detections.scores[keep], detections.labels[keep])


def _per_layer(layers, channels, out, normed=False):
    """A branch of three linear layers per decoder layer, all with the same initial weights."""
    modules = []
    for _ in range(2):
        modules += [nn.Linear(channels, channels), *([nn.LayerNorm(channels)] if normed else []), nn.ReLU(inplace=True)]
    branch = nn.Sequential(*modules, nn.Linear(channels, out))
    return nn.ModuleList(copy.deepcopy(branch) for _ in range(layers))
