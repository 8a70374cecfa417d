"""UVTR's decoder: queries attend to each other, then each to one point of the volume, its reference point.

    x <- norm(x + attention(x + p, x + p, x))               p: the query's positional embedding, the same in every layer
    x <- norm(x + W (g(x + p) V(r)) + e(r))                 V(r): the volume at the reference point, g: a sigmoid gate
    x <- norm(x + mlp(x))                                   W: a linear layer, e: an embedding of the reference point

A reference point r is stored as logits: sigmoid(r) is 0 at the low end of the volume and 1 at the high end.

A layer takes V(r) and the masks of dropout as arguments, from `sample_volume` and `DecoderLayer.masks`, because
--compile compiles layers, but neither this project's kernels nor random generators.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipad.errors import UserError
from unipad.kernels.trilinear import trilinear
from unipad.model.dropout import Dropout, drop


class DecoderLayer(nn.Module):
    """Self-attention, volume attention and MLP.

    channels: of queries and volume; heads: of the self-attention; hidden: width of the MLP; dropout: rate.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.attention = SelfAttention(channels, heads)
        self.cross = VolumeAttention(channels)
        self.expand = nn.Linear(channels, hidden)
        self.contract = nn.Linear(hidden, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.cross.attention_weights.weight)  # at first all gates are 1/2, as in the original

    def masks(self, dropout: Dropout, B: int, Q: int) -> list[Tensor | None]:
        """Dropout's masks for one `forward`, in the order in which it drops."""
        channels, hidden = self.contract.out_features, self.contract.in_features
        last = [(self.attention.heads, Q, Q), (Q, channels), (Q, channels), (Q, hidden), (Q, channels)]
        return dropout.masks(*((B, *shape) for shape in last))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        sampled: Tensor,
        blocked: Tensor | None,
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        """One layer.

        Args:
            x:         [B, Q, C] queries.
            position:  [B, Q, C] positional embeddings, added to the inputs of attention and gates, not to values.
            reference: [B, Q, 3] logits (x, y, z).
            sampled:   [B, Q, C] the volume at the reference points, from `sample_volume`.
            blocked:   [Q, Q] bool, True where the row's query must not attend to the column's; None: nowhere.
            masks:     from `self.masks`.

        Returns [B, Q, C].
        """
        of_weights, of_attention, of_cross, of_hidden, of_mlp = masks
        rate = self.dropout
        attended = self.attention(x, position, blocked, of_weights, rate)
        x = self.norms[0](x + drop(attended, of_attention, rate))
        crossed = self.cross(x + position, sampled)
        x = self.norms[1](x + drop(crossed, of_cross, rate) + self.cross.position_encoder(reference))
        hidden = drop(self.expand(x).relu(), of_hidden, rate)
        return self.norms[2](x + drop(self.contract(hidden), of_mlp, rate))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of queries to themselves, with dropout drawn per sample."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise UserError(f"--detect.heads {heads} does not divide the {channels} channels; use a divisor of them.")
        self.heads = heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x: Tensor, position: Tensor, blocked: Tensor | None, kept: Tensor | None = None, rate: float = 0.0
    ) -> Tensor:
        """x, position: [B, Q, C]; blocked: [Q, Q] bool or None; kept: [B, heads, Q, Q] mask of the attention weights
        for `drop`, and its rate; returns [B, Q, C]."""
        C = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query, key = F.linear(x + position, weight[: 2 * C], bias[: 2 * C]).chunk(2, -1)
        value = F.linear(x, weight[2 * C :], bias[2 * C :])
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        if kept is None:
            allowed = None if blocked is None else ~blocked
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)  # [B, heads, Q, C / heads]
        else:  # torch's own dropout uses the global random generator
            weights = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, heads, Q, Q]
            if blocked is not None:
                weights = weights.masked_fill(blocked, -torch.inf)
            out = drop(weights.softmax(-1), kept, rate) @ value
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class VolumeAttention(nn.Module):
    """What each query reads from the volume at its reference point, scaled by its gate: W (g V) of the formulas above.

    `attention_weights` gives the gate g; `position_encoder` is e, which `DecoderLayer` adds without dropout.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention_weights = nn.Linear(channels, 1)
        self.output_proj = nn.Linear(channels, channels)
        self.position_encoder = nn.Sequential(
            nn.Linear(3, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
        )  # fmt: skip
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x: Tensor, sampled: Tensor) -> Tensor:
        """x: [B, Q, C], positions added; sampled: [B, Q, C], from `sample_volume`; returns [B, Q, C]."""
        return self.output_proj(self.attention_weights(x).sigmoid() * sampled)


def sample_volume(volume: Tensor, reference: Tensor) -> Tensor:
    """The volume [B, Z, Y, X, C] at reference points, logits [B, Q, 3]; returns [B, Q, C]."""
    B, Z, Y, X, _ = volume.shape
    u, v, w = reference.sigmoid().unbind(-1)  # fractions of the volume
    # 0 and 1 are the faces of the outermost cells (align_corners=False), in the renderer their centers.
    cells = torch.stack([u * X, v * Y, w * Z], dim=-1) - 0.5
    sampled, _ = trilinear(volume, cells, torch.arange(B, dtype=torch.int32, device=volume.device))
    return sampled
