"""UVTR's decoder: queries look at each other, then at one point of the volume, and move the point.

    x <- norm(x + attention(x + p, x + p, x))               p is the query's place, the same in every layer
    x <- norm(x + W (g(x + p) V(r)) + e(r))                 V(r): the volume at the reference point, g: a sigmoid gate
    x <- norm(x + mlp(x))

A reference point r is kept as logits: sigmoid(r) runs from 0 at the low end of the volume to 1 at the high end.
"""

import torch
import torch.nn.functional as F
from torch import nn

from unipad.kernels.trilinear import trilinear
from unipad.model.dropout import Dropout


class DecoderLayer(nn.Module):
    """channels: of queries and volume; heads: of the attention among queries; hidden: width of the MLP."""

    def __init__(self, channels, heads, hidden):
        super().__init__()
        self.attention = SelfAttention(channels, heads)
        self.cross = VolumeAttention(channels)
        self.expand = nn.Linear(channels, hidden)
        self.contract = nn.Linear(hidden, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        for matrix in (p for p in self.parameters() if p.dim() > 1):
            nn.init.xavier_uniform_(matrix)
        nn.init.zeros_(self.cross.attention_weights.weight)

    def forward(self, x, place, reference, volume, blocked=None, dropout=None):
        """One layer.

        Args:
            x:         [B, Q, C] queries.
            place:     [B, Q, C] added to them where they ask, not where they answer.
            reference: [B, Q, 3] logits (x, y, z).
            volume:    [B, Z, Y, X, C].
            blocked:   [Q, Q] bool, True where the query of the row must not see that of the column; None = nowhere.
            dropout:   `Dropout`; None = none.

        Returns [B, Q, C].
        """
        dropout = dropout or Dropout()
        x = self.norms[0](x + dropout(self.attention(x, place, blocked, dropout)))
        x = self.norms[1](
            x + dropout(self.cross(x + place, reference, volume)) + self.cross.position_encoder(reference)
        )
        return self.norms[2](x + dropout(self.contract(dropout(self.expand(x).relu()))))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of queries among themselves, with dropout that is drawn sample by sample."""

    def __init__(self, channels, heads):
        super().__init__()
        assert channels % heads == 0, f"{channels} channels cannot be split over {heads} heads"
        self.heads = heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, place, blocked, dropout):
        """x, place: [B, Q, C]; blocked: [Q, Q] bool or None; returns [B, Q, C]."""
        C = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        asked = F.linear(x + place, weight[: 2 * C], bias[: 2 * C])
        told = F.linear(x, weight[2 * C :], bias[2 * C :])
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (*asked.chunk(2, -1), told))
        if not dropout.drops:
            seen = None if blocked is None else ~blocked
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)  # [B, heads, Q, C / heads]
        else:  # torch's own drops with global random numbers
            weights = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # [B, heads, Q, Q]
            if blocked is not None:
                weights = weights.masked_fill(blocked, -torch.inf)
            out = dropout(weights.softmax(-1)) @ value
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class VolumeAttention(nn.Module):
    """Each query takes the volume at its reference point, as much of it as its gate lets through."""

    def __init__(self, channels):
        super().__init__()
        self.attention_weights = nn.Linear(channels, 1)
        self.output_proj = nn.Linear(channels, channels)
        self.position_encoder = nn.Sequential(
            nn.Linear(3, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU(inplace=True),
        )  # fmt: skip
        nn.init.zeros_(self.attention_weights.bias)
        nn.init.zeros_(self.output_proj.bias)

    def forward(self, x, reference, volume):
        """x: [B, Q, C]; reference: [B, Q, 3] logits; volume: [B, Z, Y, X, C]; returns [B, Q, C]."""
        B, Z, Y, X, _ = volume.shape
        u, v, w = reference.sigmoid().unbind(-1)  # fractions of the range
        # The range's ends are the faces of the outermost cells (align_corners=False), unlike in the renderer.
        cells = torch.stack([u * X, v * Y, w * Z], dim=-1) - 0.5
        found, _ = trilinear(volume, cells, torch.arange(B, dtype=torch.int32, device=volume.device))
        return self.output_proj(self.attention_weights(x).sigmoid() * found)
