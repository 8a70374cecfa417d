"""Schedules of learning rate and momentum compared with values by hand; the learning rate of each parameter group."""

from dataclasses import replace

import pytest
import torch

from unipad.config import Optim
from unipad.model.pretrain import Pretrain
from unipad.optimizer import lr_factor_at, make_optimizer, momentum_at, set_rates
from unipad.recipes import PRETRAIN


def test_cosine_by_hand():
    """A linear warm-up from 1/3 to 1, times a half cosine from 1 to 0.1 over all 100 steps; factors of the peak rate.
    The momentum is constant."""
    cfg = Optim(start_factor=1 / 3, final_factor=0.1, warmup_steps=10)
    cosine = {0: 1.0, 50: 0.55, 100: 0.1}  # step -> factor
    assert lr_factor_at(cfg, 0, 100) == pytest.approx(1 / 3)
    assert lr_factor_at(cfg, 50, 100) == pytest.approx(cosine[50])
    assert lr_factor_at(replace(cfg, warmup_steps=75), 50, 100) == pytest.approx(cosine[50] * (1 / 3 + 2 / 3 * 50 / 75))
    for step, factor in cosine.items():
        assert lr_factor_at(replace(cfg, warmup_steps=0), step, 100) == pytest.approx(factor)
        assert momentum_at(cfg, step, 100) == cfg.momentum


def test_one_cycle_by_hand():
    """The learning rate rises for 40 % of the steps, then falls, as half cosines; the momentum falls, then rises."""
    cfg = Optim(schedule="one_cycle", start_factor=0.1, final_factor=0.01, rise=0.4, momentum=0.95, min_momentum=0.85)
    for step, lr, momentum in (
        (0, 0.1, 0.95),
        (20, 0.55, 0.9),
        (40, 1.0, 0.85),
        (70, 0.505, 0.9),
        (100, 0.01, 0.95),
    ):
        assert lr_factor_at(cfg, step, 100) == pytest.approx(lr) and momentum_at(cfg, step, 100) == pytest.approx(
            momentum
        )


def test_the_backbone_the_encoders_and_the_rest_have_separate_learning_rates():
    recipe = PRETRAIN["fusion"]["tiny"]
    cfg = replace(recipe.optim, lr=1.0, backbone_lr_factor=0.1, encoder_lr_factor=0.5, start_factor=1.0, warmup_steps=0)
    with torch.device("meta"):
        net = Pretrain(replace(recipe, camera=replace(recipe.camera, frozen_stages=1)))
    optimizer = make_optimizer(net, cfg)
    set_rates(optimizer, cfg, step=0, steps=100)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            assert p not in rate, name
        elif name.startswith("encoder.camera.backbone."):
            assert rate[p] == 0.1, name
        elif name.startswith("encoder.") and not name.startswith("encoder.fuse."):  # which belongs to the rest
            assert rate[p] == 0.5, name
        else:
            assert rate[p] == 1.0, name
    assert set(rate.values()) == {0.1, 0.5, 1.0}
