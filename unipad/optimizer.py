"""AdamW with the learning rate and momentum schedules of the configs of the original UniPAD code."""

import math

import torch
from torch import nn

from unipad.config import Optim


def make_optimizer(net: nn.Module, cfg: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable weights of `net`; `set_rates` multiplies a group's learning rate by its `scale`.

    net: a module whose `encoder` is an `Encoder`; the group `encoders` is all of it but the image backbone and the
        convolution that fuses both sensors, which is in the group `rest`.
    """
    groups = {"backbone": [], "encoders": [], "rest": []}
    for name, p in net.named_parameters():
        group = "rest"
        if name.startswith("encoder.") and not name.startswith("encoder.fuse."):
            group = "backbone" if name.startswith("encoder.camera.backbone.") else "encoders"
        if p.requires_grad:
            groups[group].append(p)
    scales = {"backbone": cfg.backbone_lr_factor, "encoders": cfg.encoder_lr_factor, "rest": 1.0}
    groups = [{"params": params, "scale": scales[group]} for group, params in groups.items()]
    on_gpu = next(net.parameters()).is_cuda
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=on_gpu)


def set_rates(optimizer: torch.optim.AdamW, cfg: Optim, step: int, steps: int):
    """Set the learning rate and momentum of every group for step `step` of `steps`."""
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * group["scale"] * lr_factor_at(cfg, step, steps)
        group["betas"] = (momentum_at(cfg, step, steps), 0.999)


def lr_factor_at(cfg: Optim, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a fraction of the peak."""
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg, step, steps, cfg.start_factor, 1.0, cfg.final_factor)
    warmed_up = step / cfg.warmup_steps if step < cfg.warmup_steps else 1.0  # fraction of the warm-up
    warmup_factor = cfg.start_factor + (1 - cfg.start_factor) * warmed_up
    return warmup_factor * _cosine(1.0, cfg.final_factor, step / steps)  # the cosine decays during the warm-up, too


def momentum_at(cfg: Optim, step: int, steps: int) -> float:
    """AdamW's beta1 in step `step` of `steps`."""
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg, step, steps, cfg.momentum, cfg.min_momentum, cfg.momentum)
    return cfg.momentum


def _one_cycle(cfg, step, steps, start, middle, end):
    """The value at `step`: from start to middle in the first `cfg.rise` (a fraction) of the steps, then to end."""
    first_part = cfg.rise * steps
    if step < first_part:
        return _cosine(start, middle, step / first_part)
    return _cosine(middle, end, (step - first_part) / (steps - first_part))


def _cosine(start, end, fraction):
    """The value at `fraction`: from start (0) to end (1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2
