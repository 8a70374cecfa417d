"""Images to features and depth probabilities: masked ConvNeXt, FPN, depth head.

Masked patches of 32 x 32 pixels contribute nothing to the backbone's features, as if its convolutions were sparse.
Only its 7x7 convolutions mix neighboring patches (the strided ones have kernels as large as their strides), so it is
enough that their input, the residual stream, is zero in masked patches: the mask multiplies the outputs of the stem, of
every downsampling, of every residual branch and of the norms after the stages (norms have a bias), and nothing else.
The FPN and the depth head have no mask, and fill masked patches from their neighbors.

The padding of images is encoded as in the original, but passes no gradient back. Before training, its features and the
biases are all 0, so every LayerNorm multiplies gradients there by up to 1 / sqrt(1e-6) = 1000; with them, the gradient
norm of an untrained model was 4e9 instead of 50 (docs/log.md).

Module and parameter names are those of the official ConvNeXt, of mmdet's FPN without `.conv.`, and of the original for
`input_proj` and `depth_net`.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unipad.config import CameraConfig
from unipad.errors import UserError
from unipad.model.depth import depth_head

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1]: what the published weights were trained on
STD = (0.229, 0.224, 0.225)


class CameraEncoder(nn.Module):
    """Feature levels of strides 4 * 2^fpn_start and up, and a distribution over depth bins for each cell."""

    def __init__(self, cfg: CameraConfig):
        super().__init__()
        stages = range(cfg.fpn_start, len(cfg.depths))
        self.backbone = ConvNeXt(cfg.depths, cfg.widths, cfg.drop_path, cfg.frozen_stages, out_stages=stages)
        self.neck = FPN([cfg.widths[i] for i in stages], cfg.channels, cfg.fpn_levels)
        self.input_proj = nn.Conv2d(cfg.channels, cfg.channels, 1)
        self.depth_net = depth_head(cfg)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        # Weights in the memory format of the activations: else cuDNN converts them at every call, and DDP warns about
        # gradients of 1x1 convolutions.
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        images: Tensor,
        image_sizes: Tensor,
        mask: Tensor | None = None,
        drop_noise: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Encode the images of a batch.

        Args:
            images:      [B, N, 3, H, W] RGB in [0, 1]; H and W multiples of 32.
            image_sizes: [B, N, 2] height, width before padding; the padding is zero after normalization, and cells
                         that lie wholly in it pass no gradient back.
            mask:        [B * N, 1, H / 32, W / 32] bool, True = visible; None: all are.
            drop_noise:  [B * N, blocks] uniform in [0, 1), for drop path in training; None: no path is dropped.
            generators:  one `torch.Generator` per sample, for the depth head's dropout in training; None: no dropout.

        Returns two lists over levels, channels last and contiguous, in one dtype:
            features: [B, N, h, w, C].
            depths:   [B, N, h, w, D] probabilities of the depth bins.
        """
        B, N = images.shape[:2]
        x = self.normalize(images, image_sizes).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, depths = [], []
        for level in self.neck(self.backbone(x, mask, drop_noise, image_sizes.flatten(0, 1))):
            feature = self.input_proj(level)
            logits = self.depth_net(feature, generators).permute(0, 2, 3, 1).contiguous()  # no copy in channels_last
            with torch.autocast(logits.device.type, enabled=False):  # autocast would make the probabilities fp32
                depth = logits.softmax(-1)
            features.append(feature.permute(0, 2, 3, 1).contiguous().unflatten(0, (B, N)))
            depths.append(depth.unflatten(0, (B, N)))
        return features, depths

    def normalize(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Subtract ImageNet's mean, divide by its standard deviation; zero in the padding."""
        rows = torch.arange(images.shape[-2], device=images.device)[:, None]  # [H, 1]
        cols = torch.arange(images.shape[-1], device=images.device)  # [W]
        height, width = image_sizes[..., None, None, None].unbind(2)  # [B, N, 1, 1, 1]
        return (images - self.mean) / self.std * ((rows < height) & (cols < width))


class ConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545) in which masked patches of the image contribute nothing, see the module's docstring.

    depths, widths: blocks and channels of each stage; stage i has stride 4 * 2^i.
    drop_path: rate at the last block, rising linearly from 0 at the first.
    frozen_stages: number of first stages that, with their downsampling, get no gradient and no drop path.
    out_stages: stages whose normalized outputs are returned.

    With `checkpointing`, only the input of a block is kept for the backward pass, which recomputes the block: the same
    numbers, less memory, more time.
    """

    checkpointing = False

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        drop_path: float = 0.0,
        frozen_stages: int = 0,
        out_stages: Iterable[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        self.out_stages = tuple(out_stages)
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu")
        rates[: sum(depths[:frozen_stages])] = 0
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), LayerNorm2d(widths[0], eps=1e-6))
        downs = [
            nn.Sequential(LayerNorm2d(a, eps=1e-6), nn.Conv2d(a, b, 2, stride=2))
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        ]
        self.downsample_layers = nn.ModuleList([stem, *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(*[Block(width, rate) for rate in stage_rates.tolist()])
            for width, stage_rates in zip(widths, rates.split(list(depths)), strict=True)
        )
        for i in self.out_stages:
            self.add_module(f"norm{i}", LayerNorm2d(widths[i], eps=1e-6))
        self.apply(_init_convnext)
        self.downsample_layers[:frozen_stages].requires_grad_(False)
        self.stages[:frozen_stages].requires_grad_(False)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        drop_noise: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> list[Tensor]:
        """List over `out_stages` of [M, width, H / stride, W / stride]; masked cells are exactly zero.

        images: [M, 3, H, W]; mask: [M, 1, H / 32, W / 32] bool, True = visible; None: all are.
        drop_noise: [M, blocks] uniform in [0, 1), used in training only; None: no path is dropped.
        image_sizes: [M, 2] height, width before padding; cells wholly in the padding pass no gradient back; None: no
            padding.
        """
        x, outs, inside = images, [], None
        block_noise = iter(drop_noise.unbind(1) if self.training and drop_noise is not None else ())
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = down(x)
            visible = None if mask is None else F.interpolate(mask.to(x.dtype), size=x.shape[-2:])  # [M, 1, h, w]
            if image_sizes is not None:  # padding is right and below: four cells lie in it if the upper left one does
                inside = _inside(image_sizes, x) if i == 0 else inside[..., ::2, ::2]
            x = _cut(_scaled(x, visible), inside)
            for block in stage:
                scale = _branch_scale(next(block_noise, None), block.drop_path, visible)
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, scale, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x, scale)
                x = _cut(x, inside)
            if i in self.out_stages:
                outs.append(_scaled(getattr(self, f"norm{i}")(x), visible))
        return outs


class Block(nn.Module):
    """x + scale * gamma * mlp(norm(7x7 depthwise(x)))."""

    def __init__(self, width: int, drop_path: float = 0.0, gamma: float = 1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), gamma))
        self.drop_path = drop_path  # rate at which an image skips the branch in training

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x: [M, width, h, w]; scale: [M, 1, h or 1, w or 1] or None (1), from `_branch_scale`."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).to(x.dtype)  # [M, h, w, width]
        y = F.gelu(self.pwconv1(y))
        # gamma multiplies the weights instead of the output: far fewer elements, forward and backward
        y = F.linear(y, self.gamma[:, None] * self.pwconv2.weight, self.gamma * self.pwconv2.bias)
        y = y.permute(0, 3, 1, 2)
        return x + y if scale is None else torch.addcmul(x, y, scale)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [M, C, h, w]; keeps the dtype, which autocast would make fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(x.dtype)


class FPN(nn.Module):
    """Feature pyramid of mmdet 2.14: top-down sums; each extra level is a stride-2 convolution of the level before it.

    The first extra level reads the level before it directly, the others its ReLU.
    """

    def __init__(self, widths: Sequence[int], channels: int, levels: int):
        super().__init__()
        if levels < len(widths):
            raise UserError(
                f"--camera.fpn-levels {levels} is less than the {len(widths)} stages that the FPN reads; raise it, or "
                "start the FPN at a later stage by --camera.fpn-start."
            )
        extra = levels - len(widths)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.fpn_convs = nn.ModuleList(
            [nn.Conv2d(channels, channels, 3, padding=1) for _ in widths]
            + [nn.Conv2d(channels, channels, 3, stride=2, padding=1) for _ in range(extra)]
        )
        self.apply(_init_fpn)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """inputs: list of [M, width, h, w], finest first; returns a list of `levels` [M, channels, h, w]."""
        sums = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], size=sums[i - 1].shape[-2:], mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=False)]
        for i, conv in enumerate(self.fpn_convs[len(sums) :]):
            outs.append(conv(outs[-1] if i == 0 else outs[-1].relu()))
        return outs


def _scaled(x, scale):
    """x * scale; x without a scale."""
    return x if scale is None else x * scale


def _inside(image_sizes, x):
    """[M, 1, h, w] bool: which cells of x [M, C, h, w], of 4 x 4 pixels, are not wholly padding.

    image_sizes: [M, 2] height, width before padding.
    """
    rows, cols = (torch.arange(0, 4 * size, 4, device=x.device) for size in x.shape[-2:])
    height, width = image_sizes[:, None, :, None].unbind(2)  # [M, 1, 1]
    return (rows < height)[..., None] & (cols < width)[..., None, :]


def _cut(x, inside):
    """x, with a gradient only `inside`."""
    return CutGradient.apply(x, inside) if inside is not None and x.requires_grad else x


class CutGradient(torch.autograd.Function):
    """The identity; the gradient is 0 where `inside` is False."""

    @staticmethod
    def forward(ctx, x, inside):
        ctx.save_for_backward(inside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d_out):
        return d_out.where(*ctx.saved_tensors, 0), None


def _branch_scale(noise, rate, visible):
    """The scale of a block's branch: 1 / (1 - rate) where noise >= rate, else 0; times the mask.

    noise: [M] or None (nothing is dropped); visible: [M, 1, h, w] or None (nothing is masked).
    """
    if noise is None or rate == 0:
        return visible
    scale = ((noise >= rate) / (1 - rate)).view(-1, 1, 1, 1)
    return scale if visible is None else scale.to(visible.dtype) * visible


def _init_convnext(module):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _init_fpn(module):
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
