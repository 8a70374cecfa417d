"""The parts of a camera training step, each timed separately.

    python -m benchmarks.bench_parts --preset camera-0.1

In bf16 (autocast) on a GPU, in fp32 on a CPU. ConvNeXt's depthwise 7x7 convolution and the convolution before the
renderer (`Pretrain.project`, the original's render_conv) are timed in two layouts: channels-last, as the model runs
them, and contiguous, where a library may have faster kernels. There is no depthwise kernel in this project: no
measurement shows that one would beat cuDNN's.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.bench_step import random_batch
from benchmarks.harness import DEVICE, milliseconds
from unipad.model.pretrain import Pretrain
from unipad.model.rays import choose_rays
from unipad.recipes import PRETRAIN
from unipad.runtime import generators

PRECISION = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass
class Part:
    name: str
    run: object  # function: inputs -> list of tensors; for the backward, their mean squares are summed
    inputs: list  # tensors; the backward computes their gradients
    parameters: list  # the backward computes their gradients too
    per_step: int = 1  # how often a step runs it


def autocast():
    return torch.autocast(DEVICE, PRECISION, enabled=PRECISION != torch.float32)


def parts(net, batch):
    """Yield the parts in the order of a step; their inputs are random or outputs of earlier parts."""
    camera, (H, W) = net.encoder.camera, batch.images.shape[-2:]
    images = (
        camera.normalize(batch.images, batch.image_sizes).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    )
    for i, stage in enumerate(camera.backbone.stages):  # stage i has stride 4 * 2^i
        shape = len(images), stage[0].dwconv.in_channels, H // 2 ** (i + 2), W // 2 ** (i + 2)
        for name, layout in {"": torch.channels_last, ", contiguous": torch.contiguous_format}.items():
            x = torch.randn(shape, device=DEVICE, dtype=PRECISION).contiguous(memory_format=layout)
            yield _convolution(f"depthwise 7x7, stage {i}{name}", stage[0].dwconv, x, layout, per_step=len(stage))
    yield Part("backbone", camera.backbone, [images], list(camera.backbone.parameters()))

    def encode(*_):
        features, depths = camera(batch.images, batch.image_sizes)  # a list over levels each
        return [*features, *depths]

    yield Part("camera encoder, including the backbone", encode, [], list(camera.parameters()))

    def lift(*encoded):  # what `encode` returns
        levels = len(encoded) // 2
        return [net.encoder.lift(encoded[:levels], encoded[levels:], batch.lidar2image, (H, W))]

    with torch.no_grad(), autocast():
        encoded = encode()
        volume = lift(*encoded)[0]
    yield Part("view transform", lift, encoded, [])
    for name, layout in {"": torch.channels_last_3d, ", contiguous": torch.contiguous_format}.items():
        yield _convolution(f"render_conv{name}", net.project[0], volume.contiguous(memory_format=layout), layout)

    rays = choose_rays(batch, net.recipe.rays, generators(seed=0, step=0, positions=[0], device=DEVICE))
    jitter = torch.rand(len(rays), net.renderer.jitters, device=DEVICE)

    def render(volume):
        return list(net.renderer.loss(net.renderer(volume, rays, jitter), rays).values())

    with torch.no_grad(), autocast():
        volume = net.project(volume)
    yield Part("rendering and its losses", render, [volume], list(net.renderer.parameters()))

    def step(*_):
        return list(net(batch, generators(seed=0, step=0, positions=[0], device=DEVICE))[0].values())

    yield Part("whole step, without the optimizer", step, [], list(net.parameters()))


def _convolution(name, conv, x, layout, per_step=1):
    """The `Part` of a convolution that runs `per_step` times per step, timed in the memory format `layout`."""
    conv = deepcopy(conv).to(memory_format=layout)  # a library follows the layout of the input or of the weights
    with torch.no_grad(), autocast():
        out = conv(x)
    assert out.is_contiguous(memory_format=layout) or DEVICE == "cpu", f"{name} does not keep its layout"
    return Part(name, lambda x: [conv(x)], [x], list(conv.parameters()), per_step)


def forward_backward(part, inputs):
    """Gradients of the part's inputs and parameters, in a tuple."""
    wanted = [t for t in (*inputs, *part.parameters) if t.requires_grad]
    with autocast():
        loss = sum(out.float().square().mean() for out in part.run(*inputs) if out.requires_grad)
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def measure(part):
    """Milliseconds that the part takes of a step: [forward, forward + backward]."""
    inputs = [t.detach().requires_grad_() for t in part.inputs]

    def forward():
        with autocast(), torch.no_grad():
            part.run(*inputs)

    return [part.per_step * milliseconds(fn)[0] for fn in (forward, lambda: forward_backward(part, inputs))]


def main(preset: Literal[tuple(PRETRAIN["camera"])] = "tiny"):
    recipe = PRETRAIN["camera"][preset]
    torch.manual_seed(0)
    net = Pretrain(recipe).to(DEVICE)
    print("| part | times per step | forward ms | forward + backward ms |\n|---|---|---|---|")
    for part in parts(net, random_batch(recipe)):
        forward, both = measure(part)
        print(f"| {part.name} | {part.per_step} | {forward:.3f} | {both:.3f} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
