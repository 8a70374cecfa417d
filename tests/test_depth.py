import pytest
import torch

from tests.golden import assert_close_to_max, load, under
from unipad.config import Camera
from unipad.model.depth import ASPP, ComplexDepth, depth_head


def generators(B):
    return [torch.Generator().manual_seed(b) for b in range(B)]


def test_complex_depth_is_the_original():
    arrays, _ = load("depth_net_aspp")
    net = ComplexDepth(16, 30, 6).eval()
    net.load_state_dict(under(arrays, "state/depth_net."))
    x = arrays["in/x"].requires_grad_()
    logits = net(x, generators(3))
    assert_close_to_max(logits, arrays["out/logits"], 1e-5, "logits")
    depth = logits.softmax(1)
    assert_close_to_max(depth, arrays["out/depth"], 1e-5, "depth")
    (depth * arrays["in/w_out"]).sum().backward()
    assert_close_to_max(x.grad, arrays["grad/x"], 1e-5, "x")
    gradients = under(arrays, "grad/depth_net.")
    assert gradients.keys() == dict(net.named_parameters()).keys()
    for key, param in net.named_parameters():
        assert_close_to_max(param.grad, gradients[key], 1e-5, key)


def test_aspp_looks_as_far_as_its_dilations():
    """With the image's mean cut off, a cell reaches the eight cells 6, 12 and 18 away."""
    net = ASPP(2, 3).eval().double()
    torch.nn.init.zeros_(net.global_avg_pool[1].weight)
    x = torch.randn(1, 2, 41, 41, dtype=torch.float64, requires_grad=True)
    torch.nn.init.constant_(net.bn1.bias, 100.0)  # so that no ReLU at the end hides a change
    net(x)[0, :, 20, 20].sum().backward()
    reached = {tuple(cell) for cell in (x.grad[0] != 0).any(0).nonzero().sub(20).tolist()}
    steps = [0, 6, 12, 18]
    rings = {(s * a, s * b) for s in steps for a in (-1, 0, 1) for b in (-1, 0, 1)}
    assert reached <= rings and {max(map(abs, cell)) for cell in reached} == set(steps)


def test_dropout_is_a_sample_s_own():
    """Half of the cells are dropped, the others doubled; what one sample drops does not depend on the others."""
    net = ComplexDepth(8, 4, 2).train()
    net.depth_conv[4] = torch.nn.Identity()
    x = torch.randn(4, 8, 6, 7)  # two samples of two views
    dropped = net(x, generators(2))
    again = net(x, [torch.Generator().manual_seed(7), *generators(2)[1:]])
    assert torch.equal(dropped[2:], again[2:]) and not torch.equal(dropped[:2], again[:2])
    whole = net(x)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0.4 < kept[whole > 0].float().mean() < 0.6
    assert not torch.equal(kept[0], kept[1])


def test_evaluation_drops_nothing():
    net = ComplexDepth(8, 4, 2).eval()
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(net(x, generators(2)), net(x), rtol=0, atol=0)


def test_an_unknown_head_is_refused():
    with pytest.raises(ValueError, match="choose simple or complex"):
        depth_head(Camera(depth="deep"))
