"""Camera encoder: ConvNeXt, masks and FPN, compared with records of the original and by hand."""

from dataclasses import replace

import pytest
import torch

from tests.golden import assert_close_to_max, load, recorded
from unipad.config import CameraConfig
from unipad.errors import UserError
from unipad.model.camera import FPN, MEAN, STD, Block, CameraEncoder, ConvNeXt
from unipad.model.mask import draw_mask
from unipad.recipes import PRETRAIN

DEPTHS, WIDTHS = (1, 2, 3, 1), (8, 16, 32, 64)  # blocks and channels per stage of the ConvNeXt in tests/golden
SMALL = CameraConfig(
    depths=(1, 1, 2, 1), widths=(4, 8, 16, 32), drop_path=0.0, frozen_stages=0, channels=8, fpn_levels=4, depth_bins=5
)


@pytest.mark.parametrize("name", ["convnext_mask", "convnext_nomask"])
def test_convnext_matches_the_original(name):
    arrays, _ = load(name)
    net = ConvNeXt(DEPTHS, WIDTHS)
    net.load_state_dict(recorded(arrays, "encoder.camera.backbone."))
    image = arrays["in/img"].requires_grad_()
    outs = net(image, arrays.get("in/mask"))
    for i, out in enumerate(outs):
        assert_close_to_max(out, arrays[f"out/stage{i}"], 1e-5, f"stage {i}")
    sum((out * arrays[f"in/w_{i}"]).sum() for i, out in enumerate(outs)).backward()
    assert_close_to_max(image.grad, arrays["grad/img"], 1e-5, "image")
    gradients = recorded(arrays, "encoder.camera.backbone.", "grad/")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


@pytest.mark.parametrize(
    "record, widths, levels, first",  # first: index of the first recorded input that the FPN reads
    [("fpn_vs01", [16, 32, 64], 4, 1), ("custom_fpn_single", [64], 1, 0)],  # custom_fpn_single: on the last stage only
)
def test_fpn_matches_mmdet(record, widths, levels, first):
    arrays, _ = load(record)
    net = FPN(widths, channels=24, levels=levels)
    net.load_state_dict(recorded(arrays, "encoder.camera.neck."))
    inputs = [arrays[f"in/x_{i}"].requires_grad_() for i in range(first, first + len(widths))]
    outs = net(inputs)
    for i, out in enumerate(outs):
        assert_close_to_max(out, arrays[f"out/out_{i}"], 1e-5, f"level {i}")
    sum((out * arrays[f"in/w_{i}"]).sum() for i, out in enumerate(outs)).backward()
    for i, x in enumerate(inputs, start=first):
        assert_close_to_max(x.grad, arrays[f"grad/x_{i}"], 1e-5, f"input {i}")
    gradients = recorded(arrays, "encoder.camera.neck.", "grad/")
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


def test_mask_matches_the_original():
    arrays, _ = load("convnext_mask")
    assert torch.equal(draw_mask(arrays["in/rand_masking"], h=3, w=5, ratio=0.3), arrays["in/mask"])


# kept: 15 * (1 - ratio), rounded half to even
@pytest.mark.parametrize("ratio, kept", [(0.0, 15), (0.3, 10), (0.5, 8), (0.1, 14)])
def test_mask_hides_a_fixed_number_of_patches(ratio, kept):
    mask = draw_mask(torch.rand(4, 15), h=3, w=5, ratio=ratio)
    assert mask.shape == (4, 1, 3, 5) and mask.flatten(1).sum(1).tolist() == [kept] * 4


def test_fpn_applies_relu_only_before_the_second_extra_level():
    net = FPN([3], channels=4, levels=3)
    x = torch.randn(1, 3, 8, 8)
    level, extra1, extra2 = net([x])
    torch.testing.assert_close(extra1, net.fpn_convs[1](level), rtol=0, atol=0)
    torch.testing.assert_close(extra2, net.fpn_convs[2](extra1.relu()), rtol=0, atol=0)
    assert (level < 0).any() and (extra1 < 0).any()  # so the ReLU makes a difference


def test_fpn_upsamples_to_odd_sizes():
    shapes = [(1, 2, 7, 5), (1, 2, 4, 3), (1, 2, 2, 2)]
    outs = FPN([2, 2, 2], channels=6, levels=3)([torch.randn(s) for s in shapes])
    assert [tuple(o.shape) for o in outs] == [(1, 6, 7, 5), (1, 6, 4, 3), (1, 6, 2, 2)]


def make_encoder(cfg=SMALL):
    """An encoder in which no block is close to the identity (gamma is 1e-6 at initialization)."""
    encoder = CameraEncoder(cfg)
    for name, param in encoder.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(param, 0.5, 1.0)
    return encoder


def make_images(B=2, N=3, size=(64, 96), unpadded=(50, 90)):
    """Images of `unpadded` pixels (height, width), padded to `size`: (images, image_sizes) as in `Batch`."""
    images = torch.zeros(B, N, 3, *size)
    images[..., : unpadded[0], : unpadded[1]] = torch.rand(B, N, 3, *unpadded)
    return images, torch.tensor(unpadded).expand(B, N, 2)


def test_each_fpn_level_halves_the_resolution():
    features, depths = make_encoder()(*make_images())
    assert [tuple(f.shape) for f in features] == [(2, 3, 8, 12, 8), (2, 3, 4, 6, 8), (2, 3, 2, 3, 8), (2, 3, 1, 2, 8)]
    for feature, depth in zip(features, depths, strict=True):
        assert depth.shape == (*feature.shape[:-1], SMALL.depth_bins)
        assert feature.is_contiguous() and depth.is_contiguous()
        torch.testing.assert_close(depth.sum(-1), torch.ones(depth.shape[:-1]))


def test_the_depth_head_takes_the_returned_features():
    encoder = make_encoder()
    (feature, *_), (depth, *_) = encoder(*make_images())
    weight, bias = encoder.depth_net.weight[:, :, 0, 0], encoder.depth_net.bias
    torch.testing.assert_close(depth, (feature @ weight.T + bias).softmax(-1))


def test_padding_is_zero_after_normalization():
    images, sizes = make_images()
    images[0, 0, :, 0, 0] = torch.tensor([1.0, 0.5, 0.0])
    out = make_encoder().normalize(images, sizes)  # 50 x 90 before padding
    assert (out[..., 50:, :] == 0).all() and (out[..., 90:] == 0).all()
    by_hand = [(v - m) / s for v, m, s in zip((1.0, 0.5, 0.0), MEAN, STD, strict=True)]
    torch.testing.assert_close(out[0, 0, :, 0, 0], torch.tensor(by_hand))


def test_each_image_has_its_own_padding():
    sizes = torch.tensor([[[32, 20], [10, 64]]])
    out = make_encoder().normalize(torch.ones(1, 2, 3, 32, 64), sizes)
    assert [int((view != 0).all(0).sum()) for view in out[0]] == [32 * 20, 10 * 64]


def test_padding_at_most_doubles_the_norm_of_gradients():
    """Images of four sizes are padded to 128 x 224; the first needs no padding. In an untrained encoder the padding's
    features are 0, where each LayerNorm would multiply gradients by up to 1000 if they were not stopped."""
    encoder = CameraEncoder(SMALL)
    norms = []
    for unpadded in ((128, 224), (120, 200), (124, 220), (97, 193)):
        encoder.zero_grad()
        features, _ = encoder(*make_images(1, 2, (128, 224), unpadded))
        sum(feature.square().mean() for feature in features).backward()
        grads = [param.grad.norm() for param in encoder.parameters() if param.grad is not None]
        norms.append(torch.stack(grads).norm())
    assert max(norms) < 2 * min(norms)


def test_image_sizes_stop_gradients_of_the_padding_and_change_no_output():
    net = make_encoder().backbone
    image_sizes = torch.tensor([[50, 90], [64, 31]])
    images = torch.zeros(2, 3, 64, 96)
    for image, (height, width) in zip(images, image_sizes.tolist(), strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    images.requires_grad_()
    outs, plain = net(images, image_sizes=image_sizes), net(images)
    assert all(torch.equal(a, b) for a, b in zip(outs, plain, strict=True))
    sum((out * torch.randn_like(out)).sum() for out in outs).backward()
    reached = images.grad.ne(0).any(dim=1)
    for view, (bottom, right) in zip(reached, [(52, 92), (64, 32)], strict=True):  # sizes rounded up to 4-pixel cells
        assert view[:bottom, :right].all() and not view[bottom:].any() and not view[:, right:].any()


def test_masked_patches_are_not_encoded():
    encoder = make_encoder()
    images, sizes = make_images(1, 1, (64, 96), (64, 96))
    mask = torch.tensor([[[[True, False, True], [False, True, True]]]])
    hidden = ~mask.repeat_interleave(32, 2).repeat_interleave(32, 3)[None]
    features, depths = encoder(images, sizes, mask)
    others, other_depths = encoder(images.where(~hidden, torch.rand_like(images)), sizes, mask)
    torch.testing.assert_close(features + depths, others + other_depths, rtol=0, atol=0)


def test_a_visible_patch_is_encoded_as_if_alone():
    """A visible patch among masked ones has the features of an image of just that patch: zeros surround both."""
    net = make_encoder().backbone
    image = torch.randn(1, 3, 64, 96)
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1, 2] = True
    alone = net(image[..., 32:, 64:])
    for whole, part in zip(net(image, mask), alone, strict=True):
        h, w = part.shape[-2:]
        torch.testing.assert_close(whole[..., -h:, -w:], part)
        assert whole.count_nonzero() == part.count_nonzero()


def test_mask_of_ratio_zero_changes_nothing():
    encoder, inputs = make_encoder(), make_images(1, 2)
    all_visible = draw_mask(torch.rand(2, 6), h=2, w=3, ratio=0.0)
    torch.testing.assert_close(encoder(*inputs, all_visible), encoder(*inputs), rtol=0, atol=0)


def test_frozen_stages_get_no_gradient_and_no_drop_path():
    net = ConvNeXt(DEPTHS, WIDTHS, drop_path=0.9, frozen_stages=2, out_stages=(1, 2, 3)).train()
    frozen = ("downsample_layers.0", "downsample_layers.1", "stages.0", "stages.1")
    images = torch.randn(4, 3, 32, 32)
    outs = net(images, drop_noise=torch.rand(4, 7))  # 4 images, 7 blocks
    sum(out.sum() for out in outs).backward()
    for name, param in net.named_parameters():
        assert (param.grad is None) == name.startswith(frozen), name
    assert [block.drop_path for stage in net.stages[:2] for block in stage] == [0, 0, 0]


def test_drop_path_rates_rise_linearly_to_the_last_block():
    net = ConvNeXt((3, 3, 27, 3), (2, 2, 2, 2), drop_path=0.2)
    rates = torch.tensor([block.drop_path for stage in net.stages for block in stage])
    torch.testing.assert_close(rates, torch.linspace(0, 0.2, 36))


def test_drop_path_skips_or_amplifies_a_branch():
    net = ConvNeXt((1, 1), (4, 4), drop_path=0.25, out_stages=(0,)).train()
    torch.nn.init.ones_(net.stages[0][0].gamma)
    net.stages[0][0].drop_path = 0.25  # by default 0 in the first block
    net.norm0 = torch.nn.Identity()  # outputs of stage 0 as they are
    image = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    # noise per image and block: the branch is dropped where it is less than the rate; stage 1 is not returned
    dropped, kept = net(image, drop_noise=torch.tensor([[0.2499, 0.0], [0.25, 0.0]]))[0]
    skipped = net.downsample_layers[0](image[:1])[0]
    whole = net.eval()(image[:1], drop_noise=torch.zeros(1, 2))[0][0]  # eval ignores the noise
    torch.testing.assert_close(dropped, skipped)
    torch.testing.assert_close(kept, skipped + (whole - skipped) / 0.75)


def test_drop_path_keeps_the_expectation():
    """Averaged over evenly spaced noise in [0, 1), the output is the same as without drop path."""
    net = ConvNeXt((1, 1), (4, 4), out_stages=(0,)).train()
    block = net.stages[0][0]
    torch.nn.init.ones_(block.gamma)
    net.norm0 = torch.nn.Identity()
    image = torch.randn(1, 3, 32, 32)
    whole = net(image)[0][0]
    block.drop_path = 0.3
    noise = (torch.arange(20) / 20)[:, None].expand(-1, 2)
    averaged = net(image.expand(20, -1, -1, -1), drop_noise=noise)[0].mean(0)
    torch.testing.assert_close(averaged, whole)


def test_views_are_independent():
    """A view's features do not depend on the other views in the batch."""
    encoder = make_encoder()
    images, sizes = make_images()
    mask = draw_mask(torch.rand(6, 6), h=2, w=3, ratio=0.3)
    features, _ = encoder(images, sizes, mask)
    alone, _ = encoder(images[1:, 2:], sizes[1:, 2:], mask[5:])  # the last view of the last sample
    for whole, part in zip(features, alone, strict=True):
        torch.testing.assert_close(whole[1, 2], part[0, 0])


def test_autocast_returns_bf16_close_to_fp32():
    encoder = make_encoder()
    images, sizes = make_images()
    mask = draw_mask(torch.rand(6, 6), h=2, w=3, ratio=0.3)
    exact, _ = encoder(images, sizes, mask)
    with torch.autocast("cpu", torch.bfloat16):
        features, depths = encoder(images, sizes, mask)
    assert {t.dtype for t in features + depths} == {torch.bfloat16}
    for bf16, fp32 in zip(features, exact, strict=True):
        assert_close_to_max(bf16, fp32, 0.1)
    sum(t.float().square().sum() for t in features + depths).backward()
    for name, param in encoder.named_parameters():  # autocast leaves the parameters in fp32
        assert param.grad.dtype == torch.float32 and param.grad.isfinite().all(), name


def test_every_trained_parameter_gets_a_gradient():
    """DistributedDataParallel waits for each of them."""
    encoder = make_encoder(PRETRAIN["camera"]["tiny"].camera)
    features, depths = encoder(*make_images(1, 2), draw_mask(torch.rand(2, 6), h=2, w=3, ratio=0.3))
    sum(t.square().sum() for t in features + depths).backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_fewer_levels_than_stages_are_rejected():
    with pytest.raises(UserError, match="start the FPN"):
        FPN([8, 16, 32], channels=4, levels=2)


def test_checkpointing_is_bitwise_equal(monkeypatch):
    """With a mask, drop path and a frozen stage: the results are the same, but trained blocks run forward twice."""
    encoder = make_encoder(replace(SMALL, drop_path=0.3, frozen_stages=1)).train()
    inputs, mask = make_images(1, 2), draw_mask(torch.rand(2, 6), h=2, w=3, ratio=0.3)
    drop_noise = torch.rand(2, 5)  # 2 images, 5 blocks
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: (calls.append(self), forward(self, *args))[1])
    results = []
    for on in (False, True):
        encoder.backbone.checkpointing = on
        encoder.zero_grad()
        calls.clear()
        features, depths = encoder(*inputs, mask, drop_noise)
        sum(t.square().sum() for t in features + depths).backward()
        grads = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
        results.append((features + depths, grads, len(calls)))
    (plain, plain_grads, once), (again, again_grads, twice) = results
    assert (once, twice) == (5, 9)  # calls of `Block.forward`: 5 blocks, 4 of them trained
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(torch.equal(plain_grads[name], again_grads[name]) for name in plain_grads)
