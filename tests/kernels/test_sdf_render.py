"""The fused renderer compared with the same formulas as separate ops, under autograd with a double backward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.eager import eager_field
from tests.ahead_of_time import Launch
from tests.check import check_against_ref, launches
from tests.conftest import HAS_GPU
from tests.golden import assert_close_to_max, load, strip_prefix
from unipad.config import Grid, Render
from unipad.kernels import backend, sdf_backward
from unipad.kernels import sdf_render as sdf_render_module
from unipad.kernels.composite import composite_ref
from unipad.kernels.sdf_alpha import neus_alpha_ref, volsdf_alpha_ref
from unipad.kernels.sdf_field import BLOCK_S, SEARCH_BLOCK, WIDE_WARPS, tile_launch
from unipad.kernels.sdf_pack import pack
from unipad.kernels.sdf_render import kernels_support, sdf_render, sdf_render_ref, sdf_values, sdf_values_ref
from unipad.kernels.trilinear import trilinear_ref
from unipad.model.rays import Rays
from unipad.model.render import Renderer

DEVICE = "cuda" if HAS_GPU else "cpu"
# 9 x 9 x 5 voxels over a box of +-1, +-1, +-0.25; a point at multiples of 1/8 has exact grid coordinates
CELLS_PER_UNIT, CELL_OFFSET = torch.tensor([[4.0, 4.0, 8.0], [4.0, 4.0, 2.0]], device=DEVICE)

HOPPER, AMD = ("sm_90",), ("gfx942",)
NVIDIA = ("sm_80", "sm_90", "sm_120")
OTHERS = ("sm_86", "sm_89", "sm_100", "sm_120")  # launches for HOPPER compile for these too, without budgets
VOLUME = dict(Z=5, Y=128, X=128, CHANNELS=32)  # of camera-0.1
FIELD = VOLUME | dict(C=32, H=16, PREC="tf32")  # the field of every preset
RGB = FIELD | dict(NEUS=True, SDF_LAYERS=6, RGB_LAYERS=4)
NO_RGB = RGB | dict(RGB_LAYERS=0)  # presets for LiDAR only, which render no color
IEEE = dict(PREC="ieee")  # matrix products in fp32, as on AMD GPUs
TRAIN = dict(STOP=0.0)  # rays do not stop early
WIDE = RGB | dict(C=64, H=64, CHANNELS=64)  # the widest supported field
EXACT = RGB | dict(PREC="tf32x3")  # exact=True
WIDE_EXACT = WIDE | dict(PREC="tf32x3")
SHALLOW = dict(SDF_LAYERS=2, RGB_LAYERS=2)
VOLSDF = dict(NEUS=False)
FEWER = dict(CHANNELS=20)  # than the 32 to which they are padded
ONE_VOXEL = dict(Z=1, Y=1, X=1)  # along every axis
TILE, SEARCH = dict(BLOCK_S=16), dict(BLOCK_M=32, LAYERS=6)  # samples of a ray, any samples
WIDE_SEARCH = FIELD | SEARCH | dict(C=64, H=64, CHANNELS=64)


def launch(kernel, constexprs, targets, registers=255, shared=0, stack=0, mma="", warps=1):
    """registers, shared, stack, mma: limits on those of NVIDIA that are in `targets`; other targets only compile."""
    limits_on = tuple(target for target in targets if target in NVIDIA)
    targets = tuple(dict.fromkeys(targets + OTHERS)) if HOPPER[0] in targets else targets
    # S, the samples per ray, is a multiple of 16 for the renderer (96, except in the tiny presets), but not for
    # `sdf_values`, which runs before resampling (72)
    divisible = () if kernel == "_sdf_values_kernel" or "S" in constexprs else ("S",)
    return Launch(
        kernel, constexprs, types=dict(hit_ptr="*i1"), divisible=divisible, elements=("fp32",), targets=targets,
        num_warps=warps, num_stages=1, registers=registers, shared=shared, stack=stack, mma=mma, limits_on=limits_on,
    )  # fmt: skip


# Checked by tests/test_compiles.py: kernel, constexprs, targets, registers, shared (bytes), stack (bytes), mma, warps.
# Stack (spilled registers): a thread of the forward holds the activations of all layers of half a sample. Under tf32x3,
# every operand is held in two parts, and the color's backward keeps the activations of its layers besides. A wide field
# has 16 times the weights and 4 times the activations per sample, and no preset has one.
LAUNCHES = [
    launch("_sdf_values_kernel", FIELD | SEARCH, NVIDIA, 255, 4096, 0, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN, NVIDIA, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | dict(STOP=1e-4), HOPPER, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", NO_RGB | TILE | TRAIN, NVIDIA, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", EXACT | TILE | TRAIN, NVIDIA, 255, 8192, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", WIDE | TILE | TRAIN, HOPPER, 255, 32768, 120, "HMMA", WIDE_WARPS),
    launch("_sdf_values_kernel", FIELD | SEARCH | IEEE, AMD),
    launch("_sdf_values_kernel", FIELD | SEARCH | dict(PREC="tf32x3"), NVIDIA, 255, 8192, 0, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN | IEEE, AMD),
    launch("_sdf_render_fwd_kernel", NO_RGB | TILE | TRAIN | IEEE, AMD),
    # fields that no preset has
    launch("_sdf_values_kernel", FIELD | SEARCH | FEWER, HOPPER, 255, 4096, 0, "HMMA"),
    launch("_sdf_values_kernel", FIELD | SEARCH | ONE_VOXEL, HOPPER, 255, 4096, 0, "HMMA"),
    launch("_sdf_values_kernel", WIDE_SEARCH, HOPPER, 144, 16384, 0, "HMMA", WIDE_WARPS),
    launch("_sdf_values_kernel", WIDE_SEARCH | dict(PREC="tf32x3"), HOPPER, 255, 16384, 24, "HMMA", WIDE_WARPS),
    launch("_sdf_values_kernel", WIDE_SEARCH | IEEE, AMD, warps=WIDE_WARPS),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN | VOLSDF, HOPPER, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN | FEWER, HOPPER, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN | ONE_VOXEL, HOPPER, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", RGB | TILE | TRAIN | dict(S=1), HOPPER, 255, 4096, 100, "HMMA"),
    launch("_sdf_render_fwd_kernel", WIDE_EXACT | TILE | TRAIN, HOPPER, 255, 32768, 320, "HMMA", WIDE_WARPS),
    launch("_sdf_render_fwd_kernel", WIDE | TILE | TRAIN | IEEE, AMD, warps=WIDE_WARPS),
]
# inputs (of `make_inputs`) with a gradient
GRADIENTS = ["volume", "sdf_mlp", "rgb_mlp", "density_param"]
# Slack of `check_against_ref`. The gradient of `density_param` needs more than the usual 1e-5: it is one number, in
# which the samples' terms, of both signs, nearly cancel.
SUM_SLACK = 2e-5
# Largest error under tf32, the default, of outputs and of gradients, as a fraction of the largest entry in fp64.
# Operands keep a 10-bit mantissa; ten layers and a softplus with beta = 100 amplify their errors.
TF32_BOUND, TF32_GRADIENT_BOUND = 2e-3, 2e-2


def random_mlp(conditions, outputs, hidden, layers):
    """The tensors of an MLP of sdf_reference.py, initialized like `nn.Linear`. conditions: size of the vector c."""
    widths = [(hidden, 3), *[(hidden, conditions), (hidden, hidden)] * (layers - 1), (hidden, conditions)]
    widths.append((outputs, hidden))
    tensors = []
    for rows, columns in widths:  # a matrix and its bias: P and q; of every layer C_l and d_l, W_l and b_l
        bound = columns**-0.5
        tensors += [(torch.rand(rows, columns) * 2 - 1) * bound, (torch.rand(rows) * 2 - 1) * bound]
    return tensors


def make_inputs(R, S, channels=32, hidden=16, sdf_layers=6, rgb_layers=4, density_param=20.0, B=2):
    """R rays of S samples that start near the middle of B volumes; ray 3, if there is one, is marked as a miss.

    On average, a third of the samples have no voxel around them. density_param: NeuS's inv_s, or VolSDF's beta.
    """
    rgb_conditions = 3 + channels + 3 + hidden  # direction, feature, gradient, geometry
    rgb_mlp = random_mlp(rgb_conditions, 3, hidden, rgb_layers) if rgb_layers else None
    inputs = dict(
        volume=torch.randn(B, 5, 9, 9, channels),
        origins=torch.randn(R, 3) * 0.05,
        directions=F.normalize(torch.randn(R, 3), dim=1),
        volume_idx=(torch.arange(R) % B).int(),
        hit=torch.arange(R) != 3,
        edges=(torch.rand(R, S + 1) * 1.3).sort(dim=1).values,
        sdf_mlp=random_mlp(channels, 1 + hidden, hidden, sdf_layers),  # outputs: distance, geometry
        rgb_mlp=rgb_mlp,
        density_param=torch.tensor([density_param]),
        cells_per_unit=CELLS_PER_UNIT,
        cell_offset=CELL_OFFSET,
    )
    return {name: _map(value, lambda t: t.to(DEVICE)) for name, value in inputs.items()}


def adapted(op, method="neus", **options):
    """`op` as a function of the arguments that `make_inputs` returns, like `formulas`."""

    def call(
        volume, origins, directions, volume_idx, hit, edges, sdf_mlp, rgb_mlp, density_param,
        cells_per_unit, cell_offset,
    ):  # fmt: skip
        rays, cells = (origins, directions, volume_idx, hit), (cells_per_unit, cell_offset)
        return op(volume, rays, edges, (sdf_mlp, rgb_mlp), density_param, cells, method, **options)

    return call


def formulas(method):
    """The renderer's formulas, as separate ops and MLP layers; a function of the arguments that `make_inputs` returns.

    Autograd gives the SDF's gradient.
    """

    def call(
        volume, origins, directions, volume_idx, hit, edges, sdf_mlp, rgb_mlp, density_param,
        cells_per_unit, cell_offset,
    ):  # fmt: skip
        starts, deltas = edges[:, :-1], edges.diff(dim=1)
        points = origins[:, None] + directions[:, None] * starts[..., None]

        def interpolate(points):
            return trilinear_ref(volume, points * cells_per_unit + cell_offset, volume_idx)[0]

        sdf, gradient, rgb = eager_field(interpolate, points, directions, sdf_mlp, rgb_mlp)
        if method == "neus":
            alpha = neus_alpha_ref(sdf, gradient, directions, deltas, density_param)
        else:
            alpha = volsdf_alpha_ref(sdf, deltas, density_param)
        out, weights = composite_ref(alpha * hit[:, None], torch.cat([rgb, starts[..., None]], dim=-1))
        return out[:, :3], out[:, 3] / (weights.sum(dim=1) + 1e-10), weights, sdf, gradient

    return call


def results(fn, inputs, dtype=torch.float32):
    """Outputs and gradients by name, under one fixed random upstream gradient."""
    cast = {k: _map(v, lambda t: t.detach().to(dtype) if t.is_floating_point() else t) for k, v in inputs.items()}
    leaves = [t.requires_grad_() for k in GRADIENTS for t in _tensors(cast[k])]
    outs = fn(**cast)
    gen = torch.Generator().manual_seed(1)
    ups = [torch.randn(o.shape, generator=gen).to(o) for o in outs]
    grads = torch.autograd.grad(outs, leaves, ups, allow_unused=True)
    named = dict(zip(("rgb", "depth", "weights", "sdf", "gradient"), outs, strict=True))
    names = [f"d_{k}{i}" for k in GRADIENTS for i in range(len(_tensors(cast[k])))]
    return named | {
        name: torch.zeros_like(t) if g is None else g for name, t, g in zip(names, leaves, grads, strict=True)
    }


def _map(value, fn):
    if isinstance(value, list):
        return [fn(t) for t in value]
    return fn(value) if torch.is_tensor(value) else value


def _tensors(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def assert_tiles_are_as_chosen(rows):
    """Assert that `rows` of LAUNCHES have the tiles and warps that the code chooses for their field."""
    for row in rows:
        name, block = ("BLOCK_M", SEARCH_BLOCK) if "BLOCK_M" in row.constexprs else ("BLOCK_S", BLOCK_S)
        chosen = tile_launch(row.constexprs, name, block)
        # blocks are constexprs of the launch; warps and stages are fields of their own
        assert chosen == {name: row.constexprs.get(name, getattr(row, name, None)) for name in chosen}, row


def test_launches_have_the_tiles_that_the_code_chooses():
    assert_tiles_are_as_chosen(LAUNCHES)


def assert_matches_formulas(inputs, method, rel, op=sdf_render, dtype=torch.float32, **options):
    """Assert that every output and gradient differs from `formulas` in fp64 by at most `rel` of its largest entry."""
    truth = results(formulas(method), inputs, torch.float64)
    for name, value in results(adapted(op, method, **options), inputs, dtype).items():
        assert_close_to_max(value, truth[name], rel, name)


@pytest.mark.parametrize("seed", [2, 3])
def test_field_of_the_presets_matches_the_formulas(seed):
    """All 46 gradients; samples outside the volume, rays towards the surface and away from it, a tile half full.

    The largest error of an output or gradient, compared with the formulas in fp64, is at most 1e-5 of the largest
    entry; where fp32 itself loses more (`d_density_param`, one number summed over all samples, with seed 2), at most
    twice the largest error of the formulas in fp32.
    """
    torch.manual_seed(seed)
    inputs = make_inputs(R=3, S=40)
    truth = results(formulas("neus"), inputs, torch.float64)
    in_fp32 = results(formulas("neus"), inputs)
    with launches() as launched:
        ours = results(adapted(sdf_render, exact=True), inputs)
    assert launched == [
        "_pack_fwd_kernel", "_sdf_render_fwd_kernel",
        "_sdf_render_bwd_rgb_kernel", "_sdf_render_bwd_sdf_kernel", "_pack_bwd_kernel",
    ]  # fmt: skip
    assert len(truth) == 5 + 1 + 26 + 18 + 1  # outputs; gradients of volume, sdf_mlp, rgb_mlp, density_param
    for name, true in truth.items():
        error, error_in_fp32 = ((value[name] - true).abs().max().item() for value in (ours, in_fp32))
        bound = max(1e-5 * true.abs().max().item(), 2 * error_in_fp32)
        assert error <= bound, f"{name}: off by {error:.2e} > {bound:.2e}, the formulas in fp32 by {error_in_fp32:.2e}"
    cosine = (truth["gradient"] * inputs["directions"][:, None]).sum(-1)
    assert (cosine > 0).any() and (cosine < 0).any()


@pytest.fixture
def tensor_cores(monkeypatch):
    """Matrix products as on NVIDIA's tensor cores, in the interpreter too: tf32 drops the operands' low 13 bits."""
    if HAS_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def truncate(x):
        cleared = np.ascontiguousarray(x.data).view(np.int32) & -0x2000  # the low 13 bits
        return TensorHandle(cleared.view(np.float32), x.dtype)

    def dot(builder, a, b, out, precision, *rest):
        a, b = (truncate(a), truncate(b)) if precision.name == "TF32" else (a, b)
        return plain(builder, a, b, out, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def test_tf32_errors_are_within_bounds(tensor_cores):
    """The SDF's error must also be too large for fp32: it shows that tf32 was used."""
    inputs = make_inputs(R=5, S=40)
    truth, ours = results(formulas("neus"), inputs, torch.float64), results(adapted(sdf_render), inputs)
    for name, value in ours.items():
        assert_close_to_max(value, truth[name], TF32_GRADIENT_BOUND if name.startswith("d_") else TF32_BOUND, name)
    assert (ours["sdf"] - truth["sdf"]).abs().max() > 1e-5 * truth["sdf"].abs().max()


def sdf_at_starts(op, inputs, dtype=torch.float32):
    """[R, S] SDF at the samples by `op`: `sdf_values` or its reference."""
    cast = {k: _map(v, lambda t: t.to(dtype) if t.is_floating_point() else t) for k, v in inputs.items()}
    rays = cast["origins"], cast["directions"], cast["volume_idx"]
    cells = cast["cells_per_unit"], cast["cell_offset"]
    return op(cast["volume"], rays, cast["edges"][:, :-1].contiguous(), cast["sdf_mlp"], cells)


def test_tf32_errors_have_no_bias(tensor_cores):
    """The mean error of a field's SDF is small, in twelve random fields with weights doubled to amplify errors.

    If the kernels did not round operands, tensor cores would truncate them and shrink all products: the mean error
    would be 1.6e-3 instead of 2e-4 (root mean square over the fields).
    """
    errors = []
    for _ in range(12):
        inputs = make_inputs(R=2, S=32, rgb_layers=0)
        inputs["sdf_mlp"] = [2 * t for t in inputs["sdf_mlp"]]
        errors.append(sdf_at_starts(sdf_values, inputs) - sdf_at_starts(sdf_values_ref, inputs, torch.float64))
    bias = torch.stack(errors).mean(dim=(1, 2))  # per field
    assert bias.square().mean().sqrt() < 6e-4


def test_rounding_keeps_nan():
    """A GPU's NaN has the bits 0x7fffffff: rounding in integers would carry into the sign and give -0."""
    inputs = make_inputs(R=2, S=3, sdf_layers=2, rgb_layers=0)
    inputs["edges"] *= 0.01  # near the middle
    inputs["volume"][1] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    sdf = sdf_at_starts(sdf_values, inputs)
    assert sdf[0].isfinite().all() and sdf[1].isnan().all()
    outs = results(adapted(sdf_render), inputs)
    for name in ("depth", "weights"):  # clipping opacities to 0 and 1 keeps it too
        assert outs[name][0].isfinite().all() and outs[name][1].isnan().all(), name


@pytest.mark.parametrize(
    "method, sizes",  # density_param=0.1 is VolSDF's beta; NeuS's inv_s is 20 by default
    [
        ("volsdf", dict(R=3, S=33, channels=20, hidden=24, sdf_layers=2, rgb_layers=3, density_param=0.1)),  # odd sizes
        ("neus", dict(R=1, S=1, sdf_layers=3, rgb_layers=0)),  # one sample, no color
        # exactly two tiles of 16 samples per ray
        ("volsdf", dict(R=2, S=32, channels=16, sdf_layers=2, rgb_layers=0, density_param=0.1)),
        # one sample more than two tiles; a wide field
        ("neus", dict(R=1, S=33, channels=64, hidden=64, sdf_layers=2, rgb_layers=2)),
        ("neus", dict(R=0, S=5)),  # no rays
    ],
)
def test_supported_fields_match_the_formulas(method, sizes):
    inputs = make_inputs(**sizes)
    wrt = [name for name in GRADIENTS if inputs[name] is not None]
    # magnitude: the gradient of `density_param` is one number, a sum over the samples whose terms may cancel
    check_against_ref(
        adapted(sdf_render, method, exact=True), formulas(method), inputs, torch.float32, wrt, magnitude=1e-3
    )


@pytest.mark.parametrize("method, rgb_layers", [("neus", 4), ("volsdf", 0)])
def test_reference_matches_the_formulas(method, rgb_layers):
    """In fp64."""
    inputs = make_inputs(R=7, S=13, channels=5, hidden=7, sdf_layers=3, rgb_layers=rgb_layers, density_param=5.0)
    assert_matches_formulas(inputs, method, 1e-7, sdf_render_ref, torch.float64)


@pytest.mark.parametrize("shape", [(5, 9, 9), (1, 9, 9), (5, 1, 9), (5, 9, 1), (1, 1, 1)])
def test_samples_on_cell_faces_match_the_formulas(shape):
    """Rays along the axes, with samples at multiples of half a cell; on a face the slopes are the upper cell's. Volumes
    may have one voxel along an axis."""
    inputs = make_inputs(R=2, S=16, sdf_layers=2, rgb_layers=2)
    Z, Y, X = shape
    inputs["volume"] = inputs["volume"][:, :Z, :Y, :X].contiguous()
    inputs["origins"] = torch.zeros(2, 3, device=DEVICE)
    inputs["directions"] = torch.tensor([[1.0, 0, 0], [0, -1, 0]], device=DEVICE)
    inputs["edges"] = torch.arange(17, device=DEVICE).expand(2, 17) / 8
    assert_matches_formulas(inputs, "neus", 1e-5, exact=True)


def test_opacity_clipped_to_0_and_1_matches_the_formulas():
    """A sharp surface, behind which alpha is 1; rays with negative intervals, where alpha would fall below 0."""
    inputs = make_inputs(R=3, S=12, sdf_layers=2, rgb_layers=2, density_param=1e6)
    inputs["edges"][1:] = inputs["edges"][1:].flip(1)
    before = results(formulas("neus"), inputs, torch.float64)
    cosine = (before["gradient"] * inputs["directions"][:, None]).sum(-1)
    # (ray, sample) among the negative intervals where the distance falls fastest along the ray
    steepest = 1 + cosine[1:].amin(dim=1).argmin(), cosine[1:].amin(dim=0).argmin()
    inputs["sdf_mlp"][-1][0] -= before["sdf"][steepest].float()  # the output bias: moves the surface to that sample
    truth = results(formulas("neus"), inputs, torch.float64)
    assert cosine[steepest] < 0 and truth["weights"][steepest] == 0 and (truth["sdf"][0] < -0.01).any()
    check_against_ref(adapted(sdf_render, exact=True), formulas("neus"), inputs, torch.float32, GRADIENTS)


def test_units_beyond_the_softplus_threshold_match_the_formulas():
    """The first layer's bias q puts hidden units far into the softplus's linear part, and others into its flat part."""
    inputs = make_inputs(R=2, S=12, sdf_layers=3, rgb_layers=2)
    inputs["sdf_mlp"][1][::2] += 1.0
    inputs["sdf_mlp"][1][1::4] -= 1.0
    check_against_ref(adapted(sdf_render, exact=True), formulas("neus"), inputs, torch.float32, GRADIENTS, SUM_SLACK)


def test_rays_stop_at_low_transmittance():
    """A solid volume: two rays run far into it, two are short, one misses."""
    inputs = make_inputs(R=5, S=96, sdf_layers=2, rgb_layers=2, density_param=0.1)
    inputs["sdf_mlp"][-1][0] -= 2.0  # the output bias: the distance is negative everywhere
    inputs["edges"][2:] *= 0.01
    stop = 1e-3
    with torch.no_grad():
        rgb, depth, *whole = adapted(sdf_render, "volsdf")(**inputs)
        stopped_rgb, stopped_depth, *stopped = adapted(sdf_render, "volsdf", stop=stop)(**inputs)
    weights, sdf, _ = whole
    assert (sdf < 0).all() and weights[4].sum() < 0.5
    computed = [int((of_ray != 0).sum()) for of_ray in stopped[1]]  # samples whose distance was computed
    assert all(n % BLOCK_S == 0 and 0 < n <= 64 for n in computed[:2]) and computed[2:] == [96, BLOCK_S, 96]
    # not bit by bit: compiled with STOP > 0, the kernel may round differently
    for before, after in zip(whole, stopped, strict=True):
        for ray, n in enumerate(computed):
            assert not after[ray, n:].any()
            assert_close_to_max(after[ray, :n], before[ray, :n], TF32_BOUND)
    assert 0 < (stopped_rgb - rgb).abs().max() < stop
    length = inputs["edges"][:, -1] - inputs["edges"][:, 0]
    assert ((stopped_depth - depth).abs() <= stop * length).all()


def test_rays_that_miss_stop_at_once():
    """After the first tile of 16 samples, whose distances are still computed."""
    inputs = make_inputs(R=1, S=65, sdf_layers=2, rgb_layers=2)
    inputs["hit"][:] = False
    with torch.no_grad():
        rgb, depth, weights, sdf, _ = adapted(sdf_render, stop=1e-3)(**inputs)
    assert not rgb.any() and not depth.any() and not weights.any() and sdf[:, :16].all() and not sdf[:, 16:].any()


def test_sdf_values_match_the_formulas():
    inputs = make_inputs(R=5, S=17, sdf_layers=3)
    rays = inputs["origins"], inputs["directions"], inputs["volume_idx"]
    starts, cells = inputs["edges"][:, :-1], (CELLS_PER_UNIT, CELL_OFFSET)
    truth = results(formulas("neus"), inputs, torch.float64)["sdf"]
    for fn in (sdf_values, sdf_values_ref):
        assert_close_to_max(fn(inputs["volume"], rays, starts, inputs["sdf_mlp"], cells, exact=True), truth, 1e-5)
    nothing = sdf_values(inputs["volume"], [t[:0] for t in rays], starts[:0], inputs["sdf_mlp"], cells)
    assert nothing.shape == (0, 17)
    # also packed with a color MLP
    packed = pack(inputs["sdf_mlp"], inputs["rgb_mlp"], 32, exact=True)
    given = inputs["volume"], rays, starts, inputs["sdf_mlp"], cells, True
    assert torch.equal(sdf_values(*given, packed), sdf_values(*given))


def test_rejects_invalid_arguments():
    inputs = make_inputs(R=2, S=3, sdf_layers=2, rgb_layers=0)
    for wrong, message in [
        (dict(hit=inputs["hit"][:1]), "do not match"),
        (dict(edges=inputs["edges"][:, :1]), "do not match"),  # no samples
        (dict(volume=inputs["volume"][:, :0]), "no voxel"),
        (dict(volume=inputs["volume"][..., :16]), "does not match volume"),
        (dict(volume=inputs["volume"].double()), "no kernel for"),
        (dict(sdf_mlp=random_mlp(conditions=32, outputs=9, hidden=8, layers=2)), "no kernel for"),
    ]:
        with pytest.raises(AssertionError, match=message):
            adapted(sdf_render)(**inputs | wrong)
    with pytest.raises(AssertionError, match="no gradients"):
        adapted(sdf_render, stop=1e-4)(**inputs)
    assert not kernels_support("unisurf", torch.float32, channels=32, hidden=16, sdf_layers=6, rgb_layers=4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(exact=True), "made with exact=True, not False"),
        (dict(sdf_layers=3), "made from other MLPs"),
        (dict(rgb_layers=3), "made from other MLPs"),
        (dict(rgb_layers=0), "made from other MLPs"),
        (dict(hidden=15), "made from other MLPs"),  # padded to the same 16
    ],
)
def test_rejects_what_was_packed_for_something_else(wrong, message):
    sizes, exact = dict(sdf_layers=2, rgb_layers=2), wrong.get("exact", False)
    inputs = make_inputs(R=2, S=3, **sizes)
    others = make_inputs(R=2, S=3, **sizes | wrong) if not exact else inputs
    packed = pack(others["sdf_mlp"], others["rgb_mlp"], 32, exact)
    with pytest.raises(AssertionError, match=message):
        adapted(sdf_render, packed=packed)(**inputs)
    if "rgb_layers" not in wrong:  # `sdf_values` reads the distance MLP only
        rays, cells = (inputs["origins"], inputs["directions"], inputs["volume_idx"]), (CELLS_PER_UNIT, CELL_OFFSET)
        with pytest.raises(AssertionError, match=message):
            sdf_values(inputs["volume"], rays, inputs["edges"], inputs["sdf_mlp"], cells, packed=packed)


def test_reproduces_the_original_renderer(monkeypatch):
    """The original's NeuS renderer, sampling included, through `Renderer`."""
    if not HAS_GPU:  # the interpreter is slow: few tiles, too large for any GPU's registers
        monkeypatch.setattr(sdf_backward, "BLOCK_S", 128)
        monkeypatch.setattr(sdf_render_module, "BLOCK_S", 128)
        monkeypatch.setattr(sdf_render_module, "SEARCH_BLOCK", 512)
    record = {name: value.to(DEVICE) for name, value in load("render_neus_eval")[0].items()}
    grid = Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))
    cfg = Render(free_space_weight=1.0, sdf_weight=10.0, eikonal_weight=0.01, truncation=1.5)
    renderer = Renderer(cfg, grid).to(DEVICE).eval()
    renderer.exact = True
    renderer.field.load_state_dict(strip_prefix(record, "state/pts_bbox_head.render_model.field."))
    R, unscale = len(record["in/ray_o"]), 1 / grid.scale
    rays = Rays(
        record["in/ray_o"] * unscale, record["in/ray_d"], record["in/target_depth"][:, 0] * unscale,
        record["in/target_rgb"], torch.zeros(R, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    with launches() as launched, torch.no_grad():
        out = renderer(record["in/feature_volume"][None], rays)
    assert {"_sdf_values_kernel", "_resample_kernel", "_sdf_render_fwd_kernel"} <= {*launched}
    assert_close_to_max(out.rgb, record["out/rgb"], 1e-4, "rgb")
    assert_close_to_max(out.depth * grid.scale, record["out/depth"][:, 0], 1e-4, "depth")
    # rounding may move an importance sample: it does in one of these 64 rays in the interpreter
    same = (out.starts - record["out/z_vals"][..., 0]).abs().amax(dim=1) < 1e-4
    assert same.sum() >= R - 3
    for name, key, rel in [("sdf", "sdf", 1e-3), ("gradient", "gradients", 1e-3), ("weights", "weights", 5e-3)]:
        assert_close_to_max(getattr(out, name)[same], record[f"out/{key}"].squeeze(-1)[same], rel, name)

    # gradients sum over all rays, so those of the fused backward are computed at the original's samples
    edges = torch.cat([record["out/z_vals"], record["out/ends"][:, -1:]], dim=1)[..., 0]
    renderer.sampler = lambda *_: edges
    volume = record["in/feature_volume"].requires_grad_()
    losses = renderer.loss(renderer(volume[None], rays), rays)
    for term, value in losses.items():
        assert_close_to_max(value, record[f"out/{term}_loss"], 1e-5, term)
    with launches() as launched:
        sum(losses.values()).backward()
    assert {"_sdf_render_bwd_rgb_kernel", "_sdf_render_bwd_sdf_kernel", "_pack_bwd_kernel"} <= {*launched}
    assert_close_to_max(volume.grad, record["grad/feature_volume"], 1e-3, "volume")
    expected = strip_prefix(record, "grad/pts_bbox_head.render_model.field.")
    assert len(expected) == 45  # both MLPs and the variance, from which inv_s is computed
    for name, value in expected.items():
        assert_close_to_max(renderer.field.get_parameter(name).grad, value, 1e-3, name)


@pytest.mark.parametrize("method, channels, fuses", [("volsdf", 16, True), ("neus", 8, False), ("unisurf", 16, False)])
def test_the_renderer_fuses_supported_fields(method, channels, fuses, monkeypatch):
    """Other fields run as separate ops; either way, losses and gradients equal those of these ops' references."""
    cfg = Render(
        method=method, channels=channels, samples=6, importance=4, search=8, sdf_layers=2, rgb_layers=2,
        truncation=1.5, free_space_weight=1.0, sdf_weight=10.0, eikonal_weight=0.01, features_weight=1.0,
    )  # fmt: skip
    grid = Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(2.0, 2.0, 1.0))
    renderer = Renderer(cfg, grid, feature_channels=5)
    renderer.exact = True
    volume = torch.randn(1, channels, 4, 8, 8).requires_grad_()
    directions = F.normalize(torch.randn(2, 3) * torch.tensor([1, 1, 0.2]), dim=1)
    depth = torch.tensor([4.0, 5.0])
    rays = Rays(torch.zeros(2, 3), directions, depth, torch.rand(2, 3), torch.zeros(2).int(), torch.randn(2, 5))

    def step(device):
        net, on_device = renderer.to(device), rays.each(lambda tensor: tensor.to(device))
        losses = net.loss(net(volume.to(device), on_device), on_device)
        parameters = [p for p in net.parameters() if p.requires_grad]
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), [volume, *parameters])]

    with launches() as launched:
        ours = step(DEVICE)
    assert ("_sdf_render_bwd_sdf_kernel" in launched) == ("_sdf_values_kernel" in launched) == fuses
    assert ("_trilinear_bwd_kernel" in launched) == (not fuses) and "_ray_features_bwd_kernel" in launched
    monkeypatch.setattr(backend, "interpret", False)  # on a CPU, references run
    for value, expected in zip(ours, step("cpu"), strict=True):
        assert_close_to_max(value.cpu(), expected, 1e-3)
