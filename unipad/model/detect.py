"""UVTR's detection heads (arXiv 2206.00630): queries search the volume for boxes, with and without denoising.

head        where queries start                           beside class and box     scores
plain       learned feature, place and reference point    -                        p
denoising   zero; the place is made of the reference      noisy truth (training),  sqrt(p * IoU), or p where the
                                                          a guess of its own IoU   recipe says so

What is suppressed, by rotated NMS among chosen classes, is the recipe's choice too.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unipad.boxes import CODE_SIZE, decode_boxes, footprint
from unipad.kernels.rotated_iou import rotated_nms
from unipad.model.decoder import DecoderLayer
from unipad.model.depth import depth_loss
from unipad.model.dropout import Dropout
from unipad.model.encoder import Encoder
from unipad.model.targets import detection_losses, draw_noise, noisy_queries, tensor_like

EPS = 1e-5  # shares of the range are kept so far from 0 and 1 before their logit is taken; mmdet's
PRIOR = 0.01  # score of every class at the start (focal loss, arXiv 1708.02002)


@dataclass(frozen=True)
class Predictions:
    """What each of L decoder layers says of Q queries in B samples."""

    logits: Tensor  # [L, B, Q, K] of the classes
    codes: Tensor  # [L, B, Q, 10] as `boxes.encode_boxes` has them
    iou: Tensor | None  # [L, B, Q] the guess of 2 IoU - 1 with the true box; None: the head makes none

    def split(self, n):
        """(the first n queries, the others)."""
        tensors = (self.logits, self.codes, self.iou)
        first, others = ([None if t is None else t[:, :, part] for t in tensors] for part in (slice(n), slice(n, None)))
        return Predictions(*first), Predictions(*others)


@dataclass(frozen=True)
class Detections:
    """What was found in one sample, best class score first."""

    boxes: Tensor  # [K, 9] as in `Batch`
    scores: Tensor  # [K] in [0, 1]
    labels: Tensor  # [K] int64


class Detector(nn.Module):
    """The encoder of one `config.DetectRecipe` and a head: a batch to boxes."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        if recipe.lidar is not None and recipe.lidar.learnable_token:  # nothing is hidden here, so it never learns
            self.encoder.lidar.mask_token.requires_grad_(False)
        self.head = Head(recipe.detect, recipe.grid, self.encoder.channels)

    def forward(self, batch, generators):
        """Losses of one training step: dict of name -> weighted value, as `Head.losses` has them, and `depth`.

        batch: a `Batch` on the model's device; generators: one `torch.Generator` a sample, on that device.
        """
        seen = self.encoder.encode(batch, generators, masked=False)
        losses = self.head.losses(seen.volume, batch.boxes, batch.labels, batch.box_counts, generators)
        camera = self.recipe.camera
        if camera is not None and camera.depth_weight > 0:
            losses["depth"] = depth_loss(seen.depths, batch, camera)
        return losses

    @torch.no_grad()
    def detect(self, batch):
        """What is in each sample: a list of `Detections`. Put the model in eval mode first."""
        volume, _ = self.encoder(batch, None)
        found, _ = self.head(volume)
        return detections(self.head.cfg, found)


class Head(nn.Module):
    """One `config.Detect` on volumes of `channels` over one `config.Grid`.

    Computes in the parameters' dtype, under autocast too: bf16 knows a place in the range to decimeters only.
    """

    def __init__(self, cfg, grid, channels):
        super().__init__()
        self.cfg, self.grid = cfg, grid
        self.register_buffer("low", torch.tensor(grid.low), persistent=False)
        self.register_buffer("high", torch.tensor(grid.high), persistent=False)
        layers = [DecoderLayer(channels, cfg.heads, cfg.hidden) for _ in range(cfg.layers)]
        self.layers = nn.ModuleList(layers)
        self.cls_branches = _per_layer(cfg.layers, channels, cfg.classes, normed=True)
        self.reg_branches = _per_layer(cfg.layers, channels, CODE_SIZE)
        for branch in self.cls_branches:
            nn.init.constant_(branch[-1].bias, -math.log((1 - PRIOR) / PRIOR))
        if cfg.denoising:
            self.iou_branches = _per_layer(cfg.layers, channels, 1)
            self.reference_points = nn.Embedding(cfg.queries, 3)  # shares of the range
            nn.init.uniform_(self.reference_points.weight)
            self.query_embedding = nn.Sequential(
                nn.Linear(3, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels)
            )  # fmt: skip
        else:
            self.query_embedding = nn.Embedding(cfg.queries, 2 * channels)  # place, feature
            self.reference_points = nn.Linear(channels, 3)
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)

    def forward(self, volume, noisy=None, generators=None):
        """Search volumes.

        Args:
            volume:     [B, C, Z, Y, X] features over the grid, LiDAR frame; channels_last_3d saves a copy.
            noisy:      `Noisy` ground truth as further queries (training of a denoising head), or None.
            generators: one `torch.Generator` a sample, for the dropout in training; None = nothing is dropped.

        Returns (`Predictions` of the queries, `Predictions` of the noisy ones or None). Differentiable once.
        """
        with torch.autocast(volume.device.type, enabled=False):
            volume = volume.permute(0, 2, 3, 4, 1).contiguous()  # [B, Z, Y, X, C]
            x, place, reference = self._queries(len(volume), noisy)
            dropout = Dropout(self.cfg.dropout, generators if self.training else None)
            blocked = None if noisy is None else noisy.blocked
            logits, codes, ious = [], [], []
            for i, layer in enumerate(self.layers):
                x = layer(x, place, reference, volume, blocked, dropout)
                raw = self.reg_branches[i](x)  # [B, Q, 10]
                move = torch.cat([raw[..., :2], raw[..., 4:5]], dim=-1)  # of x, y, z, as logits
                center = self.low + (self.high - self.low) * (move + self._start(reference)).sigmoid()
                codes.append(torch.cat([center[..., :2], raw[..., 2:4], center[..., 2:], raw[..., 5:]], dim=-1))
                logits.append(self.cls_branches[i](x))
                if self.cfg.denoising:
                    ious.append(self.iou_branches[i](x)[..., 0])
                reference = (reference + move).detach()
            found = Predictions(torch.stack(logits), torch.stack(codes), torch.stack(ious) if ious else None)
        return (found, None) if noisy is None else found.split(len(noisy))[::-1]

    def losses(self, volume, boxes, labels, counts, generators, noise=None):
        """Losses of one training step.

        Args:
            volume:     as for `forward`.
            boxes:      [M, 9], labels [M], counts [B]: as in `Batch`.
            generators: one `torch.Generator` a sample, for noise and dropout; None = no dropout, and `noise` is needed.
            noise:      [groups, M, 3] uniform in [0, 1) instead of drawn noise.

        Returns dict of name -> weighted value, summed over the layers: class, box, and with denoising iou,
        noisy_class, noisy_box, noisy_iou; see `detection_losses`.
        """
        noisy, counts = None, counts.tolist()
        if self.cfg.denoising:
            noise = draw_noise(self.cfg, counts, generators) if noise is None else noise
            noisy = noisy_queries(self.cfg, self.grid, boxes, labels, counts, noise)
        found, noisy_found = self(volume, noisy, generators)
        with torch.autocast(volume.device.type, enabled=False):
            losses = detection_losses(self.cfg, found, noisy_found, noisy, boxes, labels, counts)
        return {name: per_layer.sum() for name, per_layer in losses.items()}

    def _queries(self, B, noisy):
        """Features [B, Q, C], places [B, Q, C] and reference logits [B, Q, 3] to start from; the noisy ones first."""
        if not self.cfg.denoising:
            place, x = self.query_embedding.weight.expand(B, -1, -1).chunk(2, dim=-1)
            return x, place, self.reference_points(place)
        share = self.reference_points.weight.expand(B, -1, -1)
        if noisy is not None:
            share = torch.cat([noisy.references, share], dim=1)
        reference = (share.clamp(min=EPS) / (1 - share).clamp(min=EPS)).log()
        place = self.query_embedding(reference)
        return torch.zeros_like(place), place, reference

    def _start(self, reference):
        """What predicted centers are relative to. The plain head's pass through a share of the range and saturate."""
        if self.cfg.denoising:
            return reference
        most = math.log((1 - EPS) / EPS)
        return reference.clamp(-most, most)


def detections(cfg, found):
    """Boxes that the last layer stands by, sample by sample. Not differentiable; waits for the device.

    Of all queries and classes the `kept` best by class score; of these, the ones inside `center_low` .. `center_high`,
    of at least `min_score`, and not suppressed by a better one of their class where `nms` has a threshold for it.

    cfg: `config.Detect`; found: `Predictions`. Returns a list of B `Detections`.
    """
    share, query = (
        found.logits[-1].detach().sigmoid().flatten(1).topk(min(cfg.max_detections, found.logits[-1, 0].numel()))
    )
    query, labels = query // cfg.classes, query % cfg.classes  # [B, kept] each
    boxes = decode_boxes(found.codes[-1].detach().gather(1, query[..., None].expand(-1, -1, CODE_SIZE)))
    scores = share
    if found.iou is not None and cfg.iou_in_score:
        iou = ((found.iou[-1].detach() + 1) / 2).clamp(0, 1).gather(1, query)
        scores = share.sqrt() * iou.sqrt()
    low, high = tensor_like(cfg.center_low, boxes), tensor_like(cfg.center_high, boxes)
    stays = ((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(dim=-1) & (scores >= cfg.min_score)
    results = []
    for b in range(len(boxes)):
        kept = Detections(*(t[b, stays[b]] for t in (boxes, scores, labels)))
        results.append(suppressed(kept, cfg.nms))
    return results


def suppressed(found, nms):
    """`found` without the boxes that overlap a better one of their class; nms: pairs (class, greatest IoU)."""
    stays = torch.ones_like(found.scores, dtype=torch.bool)
    for label, threshold in nms:
        rows = (found.labels == label).nonzero()[:, 0]
        kept = rotated_nms(footprint(found.boxes[rows]), found.scores[rows], threshold)
        stays[rows] = False
        stays[rows[kept]] = True
    return Detections(found.boxes[stays], found.scores[stays], found.labels[stays])


def _per_layer(layers, channels, out, normed=False):
    """A branch of three linear layers for each decoder layer, all with the same weights at the start."""
    modules = []
    for _ in range(2):
        modules += [nn.Linear(channels, channels), *([nn.LayerNorm(channels)] if normed else []), nn.ReLU(inplace=True)]
    branch = nn.Sequential(*modules, nn.Linear(channels, out))
    return nn.ModuleList(copy.deepcopy(branch) for _ in range(layers))
