"""AdamW, with the rates and momenta that the original's configs set step by step."""

import math

import torch

from unipad.config import Optim


def make_optimizer(net, cfg: Optim):
    """AdamW over the weights of `net` that learn; each group's `scale` is its factor of the learning rate.

    net: a module whose `encoder` is an `unipad.model.volume.Encoder`; what is fused from both sensors is no encoder's.
    """
    groups = {"backbone": [], "encoders": [], "rest": []}
    for name, p in net.named_parameters():
        of = "rest"
        if name.startswith("encoder.") and not name.startswith("encoder.fuse."):
            of = "backbone" if name.startswith("encoder.camera.backbone.") else "encoders"
        if p.requires_grad:
            groups[of].append(p)
    scales = {"backbone": cfg.backbone_lr, "encoders": cfg.encoder_lr, "rest": 1.0}
    groups = [{"params": params, "scale": scales[of]} for of, params in groups.items()]
    on_gpu = next(net.parameters()).is_cuda
    return torch.optim.AdamW(groups, cfg.lr, weight_decay=cfg.weight_decay, fused=on_gpu)


def set_rates(optimizer, cfg: Optim, step, steps):
    """Give every group its learning rate and its momentum for step `step` of `steps`."""
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * group["scale"] * lr_at(cfg, step, steps)
        group["betas"] = (momentum_at(cfg, step, steps), 0.999)


def lr_at(cfg: Optim, step, steps):
    """Factor of the peak rate."""
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg, step, steps, cfg.start, 1.0, cfg.final)
    warm = cfg.start + (1 - cfg.start) * min(1.0, step / cfg.warmup_steps)
    return warm * _eased(1.0, cfg.final, step / steps)


def momentum_at(cfg: Optim, step, steps):
    """AdamW's first beta."""
    if cfg.schedule == "one_cycle":
        return _one_cycle(cfg, step, steps, cfg.momentum, cfg.min_momentum, cfg.momentum)
    return cfg.momentum


def _one_cycle(cfg, step, steps, start, peak, end):
    rise = cfg.rise * steps
    if step < rise:
        return _eased(start, peak, step / rise)
    return _eased(peak, end, (step - rise) / (steps - rise))


def _eased(start, end, share):
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
