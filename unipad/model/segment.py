"""Segmentation of LiDAR points: SpUNet, a linear head, cross-entropy and the Lovász softmax.

    Lovász softmax (arXiv 1705.08790): the mean, over the classes c that occur, of sum_i e_i (J_i - J_{i-1})

with e_i the errors of class c, 1 - p_c at points of class c and p_c elsewhere, in descending order, and J_i = 1 - IoU
of c if the i points with the largest errors were wrong and no others: the convex extension of 1 - IoU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad import config
from unipad.batch import Batch
from unipad.kernels.backend import host_wait
from unipad.model.encoder import Encoder


class Segmenter(nn.Module):
    """The encoder of one `config.SegmentRecipe` and a head: a batch to classes of its points."""

    def __init__(self, recipe: config.SegmentRecipe):
        super().__init__()
        self.recipe = recipe
        self.encoder = Encoder(recipe)
        self.head = nn.Linear(self.encoder.channels, recipe.segment.classes)

    def forward(self, batch: Batch, generators) -> dict[str, Tensor]:
        """Losses of one training step over one point per voxel: name -> weighted value; see `losses`.

        batch: with point labels, on the model's device. generators: not used, since nothing here is random.
        """
        logits, rows, _ = self._voxel_logits(batch)
        return losses(self.recipe.segment, logits, batch.point_labels[rows])

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[P, classes] of all points of a batch, sweeps included; a point has those of its voxel. Put the model in eval
        mode first."""
        logits, _, voxel_of = self._voxel_logits(batch)
        return logits[voxel_of]

    def segment(self, batch: Batch) -> list[Tensor]:
        """Per sample, the classes (uint8, from 1 up) of the keyframe's points, in their order. Needs eval mode too."""
        return classes_of(batch, self.logits(batch))

    def _voxel_logits(self, batch):
        """Logits [V, classes] of one point per voxel; [V] these points' rows and [P] each point's voxel, which is a row
        of the logits."""
        features, rows, voxel_of = self.encoder.lidar.voxel_features(batch.points, batch.point_counts)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype)), rows, voxel_of


def classes_of(batch: Batch, logits: Tensor) -> list[Tensor]:
    """Logits [P, classes] of a batch's points -> classes as `Segmenter.segment` returns them."""
    classes = logits.argmax(dim=1).to(torch.uint8) + 1
    is_keyframe = batch.points[:, 4] == 0  # points of sweeps have a time lag
    samples = zip(*(t.split(batch.point_counts.tolist()) for t in (classes, is_keyframe)), strict=True)
    return [of_sample[kept] for of_sample, kept in samples]


def losses(cfg: config.Segment, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`cross_entropy`, the mean over labeled points, and `lovasz`, each times its weight.

    logits: [P, K]; labels: [P] uint8 from 1 to K, 0: unlabeled. Without any label both losses are 0. Means are over the
    points of this process.
    """
    with host_wait("indices of the labeled points"):
        known = (labels > 0).nonzero()[:, 0]
    logits, labels = logits[known], labels[known].long() - 1
    cross_entropy = F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
    lovasz = lovasz_softmax(logits.softmax(dim=1), labels)
    return {"cross_entropy": cfg.cross_entropy_weight * cross_entropy, "lovasz": cfg.lovasz_weight * lovasz}


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The Lovász softmax of probabilities [P, K] and labels [P] from 0 up, over all samples at once; 0 without points.

    Differentiable once; where errors are equal, their order decides between subgradients.
    """
    if not len(labels):
        return probabilities.sum()  # 0, with a gradient for every weight, as DDP expects
    true = F.one_hot(labels, probabilities.shape[1])  # [P, K] int64: a cumsum of floats is not deterministic
    errors, order = (true - probabilities).abs().sort(dim=0, descending=True)
    # if the first i points are wrong: false negatives (those of class c) and false positives (the others)
    missed = true.gather(0, order).cumsum(dim=0)
    count = missed[-1]  # [K] points of each class
    spurious = torch.arange(1, len(labels) + 1, device=labels.device)[:, None] - missed
    loss = 1 - (count - missed).to(errors.dtype) / (count + spurious)  # [P, K] J_i
    steps = torch.cat([loss[:1], loss[1:] - loss[:-1]])  # J_0 = 0
    present = (count > 0).to(errors.dtype)
    return ((errors * steps).sum(dim=0) * present).sum() / present.sum()
