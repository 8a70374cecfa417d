import pytest
import torch

from tests.ahead_of_time import Launch
from tests.check import check_against_ref
from tests.kernels.test_sdf_render import random_mlp
from unipad.kernels.backend import references
from unipad.kernels.sdf_field import ONE, POINT
from unipad.kernels.sdf_pack import pack, pack_bwd, pack_bwd_ref, pack_ref


def launch(kernel, registers, shared, channels=32, hidden=16, sdf_layers=6, rgb_layers=4):
    layers = sdf_layers + rgb_layers
    lengths = {"p": 2 if rgb_layers else 1, "q": 2 if rgb_layers else 1} | dict.fromkeys("cdwb", layers)
    prefixes = ("", "d_") if "bwd" in kernel else ("",)
    types = {f"{prefix}{kind}_ptrs": ("*",) * n for prefix in prefixes for kind, n in lengths.items()}
    sizes = dict(CHANNELS=channels, HIDDEN=hidden, C=channels, H=hidden, SDF_LAYERS=sdf_layers, RGB_LAYERS=rgb_layers)
    if "fwd" in kernel:
        sizes["ROUND"] = True
    return Launch(
        kernel, sizes | dict(BLOCK=16), types, elements=("fp32",), num_warps=2, registers=registers, shared=shared
    )


LAUNCHES = [  # of the presets' field with and without color, and of the widest; checked by tests/test_compiles.py
    launch("_pack_fwd_kernel", registers=128, shared=4096),
    launch("_pack_fwd_kernel", registers=128, shared=4096, rgb_layers=0),
    launch("_pack_fwd_kernel", registers=255, shared=13312, channels=64, hidden=64, sdf_layers=2, rgb_layers=2),
    launch("_pack_bwd_kernel", registers=128, shared=11264),
    launch("_pack_bwd_kernel", registers=144, shared=11264, rgb_layers=0),
    launch("_pack_bwd_kernel", registers=255, shared=38912, channels=64, hidden=64, sdf_layers=2, rgb_layers=2),
]


def inputs_of(device, channels=32, hidden=16, sdf_layers=6, rgb_layers=4):
    sdf_mlp = random_mlp(channels, 1 + hidden, hidden, sdf_layers)
    rgb_mlp = random_mlp(3 + channels + 3 + hidden, 3, hidden, rgb_layers) if rgb_layers else None
    cast = {"sdf_mlp": sdf_mlp, "rgb_mlp": rgb_mlp}
    return {k: v and [t.to(device, torch.float64) for t in v] for k, v in cast.items()} | dict(channels=channels)


SIZES = pytest.mark.parametrize(
    "channels, hidden, sdf_layers, rgb_layers",
    [
        (32, 16, 6, 4),  # of the presets: exactly a block of hidden units
        (32, 16, 6, 0),  # without color
        (17, 17, 2, 2),  # one more than a block
        (5, 7, 2, 3),  # odd sizes below the padded width
        (1, 1, 3, 2),
        (64, 64, 2, 2),  # the widest; the distance's last layer has one row more than four blocks
    ],
)


@SIZES
def test_pack_matches_reference(channels, hidden, sdf_layers, rgb_layers, device):
    """With the padding, in every order."""
    inputs = inputs_of(device, channels, hidden, sdf_layers, rgb_layers) | dict(exact=True)

    def tensors_of(fn):
        return lambda **given: fn(**given)[:3]

    check_against_ref(tensors_of(pack), tensors_of(pack_ref), inputs, torch.float32)


@SIZES
def test_gradients_match_reference(channels, hidden, sdf_layers, rgb_layers, device):
    """Of all tensors, which the reference computes by autograd."""
    inputs = inputs_of(device, channels, hidden, sdf_layers, rgb_layers)
    packed = pack_ref(**inputs, exact=True)
    inputs["d_sdf"], inputs["d_rgb"] = torch.randn_like(packed.sdf), packed.rgb_w.new_empty(0)
    if rgb_layers:
        inputs["d_rgb"] = torch.randn_like(packed.rgb_w[0])

    def tuple_of(bwd):
        return lambda **given: tuple(bwd(**given))

    # magnitude: with one hidden unit a weight's gradient is one sum, whose terms may cancel
    check_against_ref(tuple_of(pack_bwd), tuple_of(pack_bwd_ref), inputs, torch.float32, wrt=(), magnitude=0.1)


@pytest.mark.parametrize("fn", [pack, pack_ref])
def test_pack_by_hand(fn, device):
    """One channel, one hidden unit, two layers: one row of the first, two of the last, all padded to 16.

    Columns: W from 0, A from 16, E from 32.
    """
    values = [[[1, 2, 3]], [4], [[5]], [6], [[2]], [7], [[10]], [1], [[3], [4]], [0.5, -0.5]]  # P, q, C, d, W, b, ...
    mlp = [torch.tensor(v, dtype=torch.float32, device=device) for v in values]
    packed = fn(mlp, None, channels=1)
    expected = torch.zeros(16 + 1 + 16, 16 + 16 + 16)
    expected[0, 16] = 2 * 5
    point, one = 32 + POINT.value, 32 + ONE.value
    expected[0, point : point + 3], expected[0, one] = torch.tensor([2.0, 4, 6]), 2 * (6 + 4) + 7
    for row, w, b in ((16, 3, 0.5), (17, 4, -0.5)):
        expected[row, 0], expected[row, 16], expected[row, one] = w, w * 10, w * 1 + b
    assert torch.equal(packed.sdf.cpu(), expected) and packed.rgb_w.shape == (0,)
    # the last layer's row of the distance is behind all others in both orders
    assert all(torch.equal(order[-1].cpu(), expected[16]) for order in packed.sdf_w)


def test_gradient_by_hand(device):
    """Of the sum of all packed numbers; the MLP of `test_pack_by_hand`, with its sums over columns and rows."""
    values = [[[1, 2, 3]], [4], [[5]], [6], [[2]], [7], [[10]], [1], [[3], [4]], [0.5, -0.5]]
    mlp = [torch.tensor(v, dtype=torch.float32, device=device) for v in values]
    grads = pack_bwd(mlp, None, 1, torch.ones(33, 48, device=device), torch.empty(0, device=device))
    # of W_0: C + P + d + q; of W_1, beside its own columns: C + d
    expected = [[[2, 2, 2]], [2], [[2]], [2], [[5 + 6 + 6 + 4]], [1], [[7]], [7], [[1 + 10 + 1]] * 2, [1, 1]]
    assert [g.tolist() for g in grads] == expected


@pytest.mark.parametrize("fn", [pack, pack_ref])
def test_weights_are_rounded_to_tf32(fn, device):
    """Half of the last bit away from 0, less than half towards it; the matrix by rows is as it was."""
    inputs = inputs_of(device, sdf_layers=2, rgb_layers=2)
    mlps = [[torch.zeros_like(t, dtype=torch.float32) for t in inputs[name]] for name in ("sdf_mlp", "rgb_mlp")]
    half, less = 1 + 2.0**-11, -(1 + 2.0**-12)
    for mlp in mlps:
        mlp[8][0], mlp[8][1:] = half, less  # W of the second layer
    packed = fn(*mlps, 32)
    assert set(packed.sdf.unique().tolist()) == {less, 0.0, half}
    for w in (packed.sdf_w, packed.rgb_w):
        assert set(w.unique().tolist()) == {-1.0, 0.0, 1 + 2.0**-10}
    assert set(fn(*mlps, 32, exact=True).rgb_w.unique().tolist()) == {less, 0.0, half}


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize(
    "mlp, wrong, message",
    [
        ("sdf_mlp", lambda mlp: mlp[:-4], "the distance MLP has 6 tensors: not 2, and 4 for each of at least two"),
        ("sdf_mlp", lambda mlp: mlp[:-1], "the distance MLP has 9 tensors"),
        ("rgb_mlp", lambda mlp: mlp[:2] + [mlp[2][:, :-1]] + mlp[3:], r"tensor 2 of the color MLP is \[16, 53\], not"),
        ("sdf_mlp", lambda mlp: mlp[:-1] + [mlp[-1][:-1]], r"tensor 9 of the distance MLP is \[16\], not \[17\]"),
        ("rgb_mlp", lambda mlp: mlp[:1] + [mlp[1].double()] + mlp[2:], "tensor 1 of the color MLP is torch.float64"),
    ],
)
def test_rejects_mlps_of_other_shapes_and_types(mlp, wrong, message, path, device):
    inputs = inputs_of(device, sdf_layers=2, rgb_layers=2)
    inputs = {k: [t.float() for t in v] if isinstance(v, list) else v for k, v in inputs.items()}
    inputs[mlp] = wrong(inputs[mlp])
    with pytest.raises(AssertionError, match=message):
        if path == "kernel":
            pack(**inputs)
        else:
            with references():
                pack(**inputs)


def test_kernels_pack_fp32_only(device):
    with pytest.raises(AssertionError, match="in fp32, not torch.float64"):
        pack(**inputs_of(device, sdf_layers=2, rgb_layers=2))
