"""The renderer compared with records of the original, a double backward in plain PyTorch, and values by hand."""

from dataclasses import replace

import pytest
import torch

import benchmarks.eager
from benchmarks.eager import EagerRenderer
from tests.check import launches
from tests.conftest import HAS_GPU
from tests.golden import assert_close_to_max, load, recorded
from unipad.config import Grid, Render
from unipad.kernels import backend
from unipad.kernels.lift import lift
from unipad.kernels.sdf_alpha import laplace_density, neus_alpha
from unipad.kernels.trilinear import trilinear
from unipad.model.field import Field
from unipad.model.rays import Rays, concatenated
from unipad.model.render import Renderer
from unipad.model.samplers import unisurf_edges
from unipad.model.volume import ConvNormReLU3d

FIELD = "pts_bbox_head.render_model.field."
RECORDED_GRID = Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))
# The losses of the records besides `rgb` and `depth`, which are on by default; `points` is off
RECORDED_LOSSES = dict(free_space_weight=1.0, sdf_weight=10.0, eikonal_weight=0.01)
SMALL_GRID = Grid(low=(-8.0, -8.0, -2.0), high=(8.0, 8.0, 2.0), cell=(2.0, 2.0, 1.0))
SMALL = Render(samples=12, importance=6, channels=8, truncation=1.5, **RECORDED_LOSSES)


def recorded_rays(record, suffix=""):
    """Rays and targets of a record, converted from scaled meters. suffix: "_1" for the arrays of batch sample 1."""
    unscale = 1 / RECORDED_GRID.scale
    names = ("ray_o", "ray_d", "target_depth", "target_rgb") if not suffix else ("ray_o", "ray_d", "depth", "rgb")
    origins, directions, depth, rgb = (record[f"in/{name}{suffix}"] for name in names)
    idx = torch.full((len(depth),), int(suffix[1:] or 0), dtype=torch.int32)
    return Rays(origins * unscale, directions, depth[:, 0] * unscale, rgb, idx)


def random_scene(B=2, per_sample=(9, 14), channels=8, grid=SMALL_GRID, dtype=torch.float32):
    """A random volume and rays that start near its center, some 30 % of them without depth.

    per_sample: number of rays of each batch sample; the rays of all samples are shuffled.
    """
    X, Y, Z = grid.shape
    volume = torch.randn(B, channels, Z, Y, X, dtype=dtype)
    idx = torch.cat([torch.full((n,), b) for b, n in enumerate(per_sample)]).int()
    idx = idx[torch.randperm(len(idx))]
    R = len(idx)
    directions = torch.nn.functional.normalize(torch.randn(R, 3, dtype=dtype) * torch.tensor([1, 1, 0.2]), dim=1)
    depth = torch.where(torch.rand(R) < 0.3, -1, 1 + 6 * torch.rand(R)).to(dtype)
    return volume, Rays(torch.randn(R, 3, dtype=dtype) * 0.3, directions, depth, torch.rand(R, 3, dtype=dtype), idx)


def gradients(losses, renderer, volume):
    """{name: gradient of the sum of `losses`} for the volume and every trained parameter."""
    named = {"volume": volume} | {name: p for name, p in renderer.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(sum(losses.values()), list(named.values())), strict=True))


def test_field_equals_the_original():
    record, _ = load("render_sdf_field")
    field = Field(Render(), RECORDED_GRID)
    field.load_state_dict(recorded(record, "renderer.field."))
    volume = record["in/feature_volume"].requires_grad_()
    starts, deltas = record["in/starts"][..., 0], record["in/deltas"][..., 0]
    directions = record["in/directions"]
    points = record["in/origins"][:, None] + directions[:, None] * starts[..., None]
    inputs = volume.permute(1, 2, 3, 0)[None], points
    idx = torch.zeros(len(starts), dtype=torch.int32)

    sdf, gradient, rgb = field(*inputs, directions, idx)
    out = dict(sdf=sdf[..., None], gradients=gradient, rgb=rgb)
    out["alphas"] = neus_alpha(sdf, gradient, directions, deltas, field.inv_s)[..., None]
    out["density"] = laplace_density(sdf, field.beta)[..., None]
    for name, value in out.items():
        assert_close_to_max(value, record[f"out/{name}"], 1e-5, name)
    assert_close_to_max(field.sdf(*inputs, idx), record["out/sdf"][..., 0], 1e-5, "sdf alone")
    with torch.no_grad():
        assert_close_to_max(field.sdf(*inputs, idx), record["out/sdf"][..., 0], 1e-5, "sdf alone, without gradients")

    # in/w_*: the upstream gradients
    sum((value * record[f"in/w_{name}"]).sum() for name, value in out.items()).backward()
    assert_close_to_max(volume.grad, record["grad/feature_volume"], 1e-4, "volume")
    for name, expected in recorded(record, "renderer.field.", "grad/").items():
        assert_close_to_max(field.get_parameter(name).grad, expected, 1e-3, name)


@pytest.mark.parametrize(
    "name, cfg, weights_tolerance",
    [
        ("render_neus_eval", Render(**RECORDED_LOSSES), 5e-3),
        ("render_volsdf_eval", Render(method="volsdf", samples=16, importance=48, search=64, **RECORDED_LOSSES), 2e-2),
    ],
)
def test_rendering_equals_the_original(name, cfg, weights_tolerance):
    """Outputs, every recorded loss with two truncations, and all gradients."""
    record, meta = load(name)
    renderer = Renderer(replace(cfg, truncation=1.5), RECORDED_GRID).eval()
    renderer.field.load_state_dict(recorded(record, "renderer.field."))
    volume = record["in/feature_volume"].requires_grad_()
    rays = recorded_rays(record)

    out = renderer(volume[None], rays)
    assert out.hit.all()
    assert_close_to_max(out.rgb, record["out/rgb"], 1e-4, "rgb")
    assert_close_to_max(out.depth * RECORDED_GRID.scale, record["out/depth"][:, 0], 1e-4, "depth")
    assert_close_to_max(out.starts, record["out/z_vals"][..., 0], 1e-3, "starts")
    assert_close_to_max(out.sdf, record["out/sdf"][..., 0], 1e-3, "sdf")
    assert_close_to_max(out.gradient, record["out/gradients"], 1e-3, "gradient")
    # rounding shifts weight between samples that nearly coincide: see fp32_noise_floor in the record's JSON file
    assert_close_to_max(out.weights, record["out/weights"][..., 0], weights_tolerance, "weights")

    losses = renderer.loss(out, rays)
    assert list(losses) == ["rgb", "depth", "free_space", "sdf", "eikonal"]
    for term, value in losses.items():
        assert_close_to_max(value, record[f"out/{term}_loss"], 1e-5, term)
    narrow = Renderer(replace(cfg, truncation=0.1), RECORDED_GRID)  # its weights do not matter: only `loss` is used
    for term, value in narrow.loss(out, rays).items():
        assert_close_to_max(value, record[f"out/trunc0.1_{term}_loss"], 1e-5, f"{term}, truncation 0.1")

    computed = gradients(losses, renderer, volume)
    expected = {"volume": record["grad/feature_volume"]}
    expected |= {f"field.{key}": value for key, value in recorded(record, "renderer.field.", "grad/").items()}
    assert computed.keys() == expected.keys()
    for key, value in expected.items():
        assert_close_to_max(computed[key], value, 1e-3, key)
    frozen = {n for n, p in renderer.field.named_parameters() if not p.requires_grad}
    assert frozen == {key.removeprefix(FIELD) for key in meta["params_without_grad"]}


def test_unisurf_places_samples_as_the_original():
    record, _ = load("render_unisurf_sampler")
    cfg = Render(method="unisurf", samples=24, importance=16, search=48)
    field = Field(cfg, RECORDED_GRID)
    field.load_state_dict(recorded(record, "renderer.field."))
    volume = record["in/feature_volume"].permute(1, 2, 3, 0)[None]
    origins, directions = record["in/origins"], record["in/directions"]
    idx = torch.zeros(len(origins), dtype=torch.int32)
    near, far = record["in/nears"][:, 0], record["in/fars"][:, 0]

    def sdf_at(starts):
        return field.sdf(volume, origins[:, None] + directions[:, None] * starts[..., None], idx)

    with torch.no_grad():
        edges = unisurf_edges(cfg, sdf_at, near, far, jitter=[None] * 3, beta=None)
    assert_close_to_max(edges[:, :-1], record["out/starts"][..., 0], 1e-4, "starts")
    assert_close_to_max(edges[:, 1:], record["out/ends"][..., 0], 1e-4, "ends")
    # where the SDF changes sign along a ray, samples are close together: 10 times closer than 24 uniform ones
    assert (edges.diff(dim=1).amin(dim=1) < (far - near) / 240).any()


def test_training_step_of_the_render_head_equals_the_original():
    """Lift from two levels, projection with batch statistics, two batch samples rendered with the recorded jitter.

    Losses, all gradients, and the running statistics afterwards; no optimizer step.
    """
    record, _ = load("render_head_viewtrans_train")
    leaves = [record[f"in/{kind}_{l}"].requires_grad_() for kind in ("feat", "depth_map") for l in (0, 1)]  # l: level
    features = [f.permute(0, 1, 3, 4, 2) for f in leaves[:2]]  # [B, N, h, w, C]
    depths = [d.unflatten(0, (2, 6)).permute(0, 1, 3, 4, 2) for d in leaves[2:]]  # [B * N, ...] to [B, N, h, w, D]
    H, W = record["in/img_shape"][0, 0, :2].tolist()
    lidar2image = record["in/lidar2img"][:, :, 0]  # of the only camera frame, the keyframe
    low, cell, shape = RECORDED_GRID.low, RECORDED_GRID.cell, RECORDED_GRID.shape
    volume = lift(features, depths, lidar2image, low, cell, shape, image_size=(H, W), depth_range=(0.0, 64.0))
    volume = volume.permute(0, 4, 1, 2, 3)
    assert_close_to_max(volume, record["out/unified_volume"], 1e-5, "unified volume")

    head = torch.nn.ModuleDict({"project": ConvNormReLU3d(12, 32), "renderer": Renderer(Render(), RECORDED_GRID)})
    head.load_state_dict(recorded(record, ""))
    volume = head["project"](volume)
    assert_close_to_max(volume, record["out/render_volume"], 1e-5, "render volume")
    parts = [recorded_rays(record, f"_{b}") for b in range(2)]
    rays = concatenated(parts)
    # [R, 2]: rand_0 and rand_1 are of batch sample 0 (stratified, importance), rand_2 and rand_3 of 1
    jitter = torch.cat([torch.cat([record[f"in/rand_{2 * b + i}"] for i in range(2)], dim=1) for b in range(2)])
    out = head["renderer"](volume, rays, jitter)
    for name, rel in (("rgb", 1e-4), ("depth", 1e-4), ("sdf", 5e-3), ("weights", 5e-3)):
        expected = torch.cat([record[f"out/{name}_{b}"] for b in range(2)]).squeeze(-1)
        actual = out.depth * RECORDED_GRID.scale if name == "depth" else getattr(out, name)
        assert_close_to_max(actual, expected, rel, name)
    losses = head["renderer"].loss(out, rays)
    assert list(losses) == ["rgb", "depth"]
    for term, value in losses.items():
        assert_close_to_max(value, record[f"out/{term}_loss"], 1e-5, term)

    sum(losses.values()).backward()
    for name, leaf in zip(("feat_0", "feat_1", "depth_map_0", "depth_map_1"), leaves, strict=True):
        assert_close_to_max(leaf.grad, record[f"grad/{name}"], 1e-3, name)
    for name, expected in recorded(record, "", "grad/").items():
        if name != "project.0.bias":  # followed by a batch norm, so its gradient is only rounding
            assert_close_to_max(head.get_parameter(name).grad, expected, 5e-3, name)
    for name, expected in recorded(record, "", "out/after/").items():  # running mean and variance
        assert_close_to_max(head.state_dict()[name], expected, 1e-5, name)


def test_rays_that_the_original_rejects_do_not_hit():
    """Where the original fails an assertion since a ray misses the box, ours renders black at depth 0."""
    record, _ = load("render_collider")
    hits, misses = len(record["in/origins"]), len(record["in/miss_origins"])
    assert record["out/miss_assert_fired"].all()
    origins = torch.cat([record["in/origins"], record["in/miss_origins"]]) / RECORDED_GRID.scale
    directions = torch.cat([record["in/directions"], record["in/miss_directions"]])
    R = len(origins)
    rays = Rays(origins, directions, torch.full((R,), 5.0), torch.rand(R, 3), torch.zeros(R, dtype=torch.int32))
    renderer = Renderer(replace(SMALL, channels=4), RECORDED_GRID)
    out = renderer(torch.randn(1, 4, *RECORDED_GRID.shape[::-1]), rays)
    assert out.hit.tolist() == [True] * hits + [False] * misses
    assert_close_to_max(out.starts[:hits, 0], record["out/nears"][:, 0], 1e-6, "near")
    assert (out.starts[:hits, -1] < record["out/fars"][:, 0] * (1 + 1e-6)).all()
    assert (out.rgb[hits:] == 0).all() and (out.depth[hits:] == 0).all() and (out.weights[hits:] == 0).all()
    assert all(torch.isfinite(value) for value in renderer.loss(out, rays).values())


@pytest.mark.parametrize("twice", [False] + [True] * benchmarks.eager.TWICE_DIFFERENTIABLE)
def test_gradients_equal_double_backward(twice, monkeypatch):
    """In fp64: a hand-written SDF gradient with first-order autograd equals the original's double backward.

    twice: whether `EagerRenderer` samples with `F.grid_sample`, where that is twice differentiable, or with gathers.
    """
    monkeypatch.setattr(benchmarks.eager, "TWICE_DIFFERENTIABLE", twice)
    volume, rays = random_scene(dtype=torch.float64)
    volume.requires_grad_()
    jitter = torch.rand(len(rays.depth), 2, dtype=torch.float64)
    renderer = Renderer(SMALL, SMALL_GRID).double()
    eager = EagerRenderer(renderer)
    ours, theirs = renderer(volume, rays, jitter), eager(volume, rays, jitter)
    for name in ("rgb", "depth", "weights", "starts", "sdf", "gradient"):
        assert_close_to_max(getattr(ours, name), getattr(theirs, name), 1e-8, name)
    losses, their_losses = renderer.loss(ours, rays), eager.loss(theirs, rays)
    for name, value in their_losses.items():
        assert_close_to_max(losses[name], value, 1e-8, name)
    expected = gradients(their_losses, renderer, volume)
    for name, value in gradients(losses, renderer, volume).items():
        assert_close_to_max(value, expected[name], 1e-8, name)


def test_sdf_gradient_is_the_derivative_of_the_distance():
    """In fp64, compared with first-order autograd of only the distance; most of the points are outside the volume.

    In scaled meters, the volume is 2 x 2 x 0.5 and the points are in a cube of side 2.2, both around the origin.
    """
    field = Field(SMALL, SMALL_GRID).double()
    volume, _ = random_scene(dtype=torch.float64)
    volume = volume.permute(0, 2, 3, 4, 1).contiguous()
    points = (torch.rand(6, 20, 3, dtype=torch.float64) * 2.2 - 1.1).requires_grad_()
    idx = torch.arange(6).int() % 2
    directions = torch.zeros(6, 3, dtype=torch.float64)  # only the color depends on them
    _, gradient, _ = field(volume, points, directions, idx)
    (expected,) = torch.autograd.grad(field.sdf(volume, points, idx).sum(), points)
    assert_close_to_max(gradient, expected, 1e-12)


@pytest.mark.parametrize("method", ["neus", "volsdf", "unisurf"])
def test_rays_that_miss_do_not_count(method):
    cfg = replace(SMALL, method=method, search=16)
    volume, rays = random_scene(dtype=torch.float64)
    volume.requires_grad_()
    # 30 m away, and all with a target depth: -1, for none, becomes 1
    misses = Rays(rays.origins[:3] + 30, rays.directions[:3], rays.depth[:3].abs(), rays.rgb[:3], rays.volume_idx[:3])
    both = concatenated([misses, rays])
    renderer = Renderer(cfg, SMALL_GRID).double()
    jitter = torch.rand(len(both), renderer.jitters, dtype=torch.float64)
    alone, mixed = renderer(volume, rays, jitter[3:]), renderer(volume, both, jitter)
    assert alone.hit.all() and not mixed.hit[:3].any() and mixed.hit[3:].all()
    losses, with_misses = renderer.loss(alone, rays), renderer.loss(mixed, both)
    for name in losses:
        torch.testing.assert_close(with_misses[name], losses[name], rtol=1e-10, atol=0)
    expected = gradients(losses, renderer, volume)
    for name, value in gradients(with_misses, renderer, volume).items():
        assert_close_to_max(value, expected[name], 1e-8, name)


def test_the_eager_peer_renders_volumes_that_no_ray_hits():
    """One that its rays miss, and one without rays: as `Renderer`, losses included."""
    volume, rays = random_scene()
    rays = rays[rays.volume_idx == 0]
    rays = Rays(rays.origins + 30, rays.directions, rays.depth.abs(), rays.rgb, rays.volume_idx)
    renderer = Renderer(SMALL, SMALL_GRID)
    eager = EagerRenderer(renderer)
    ours, theirs = renderer(volume, rays), eager(volume, rays)
    assert not ours.hit.any() and len(volume) == 2
    for name in ("rgb", "depth", "weights", "hit", "of_volume"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    expected = renderer.loss(ours, rays)
    losses = eager.loss(theirs, rays)
    assert losses.keys() == expected.keys() and all(losses[name] == expected[name] == 0 for name in losses)


def test_only_misses_and_no_rays_at_all():
    volume, rays = random_scene()
    volume.requires_grad_()
    renderer = Renderer(SMALL, SMALL_GRID)
    misses = replace(rays, origins=rays.origins + 30)
    for case in (misses, rays[:0]):
        out = renderer(volume, case)
        assert out.rgb.shape == (len(case), 3) and not out.hit.any()
        losses = renderer.loss(out, case)
        assert all(value == 0 for value in losses.values())
        assert all((g == 0).all() for g in gradients(losses, renderer, volume).values())


@pytest.mark.parametrize("method", ["neus", "unisurf"])
def test_losses_of_a_batch_are_the_mean_of_those_of_its_samples(method):
    """Two samples with unequal numbers of rays. Not VolSDF: how often it samples depends on all rays of the call."""
    volume, rays = random_scene()
    renderer = Renderer(replace(SMALL, method=method, search=16), SMALL_GRID)
    jitter = torch.rand(len(rays), renderer.jitters)
    losses = renderer.loss(renderer(volume, rays, jitter), rays)
    singles = []
    for b in range(2):
        own = rays.volume_idx == b
        alone = replace(rays[own], volume_idx=torch.zeros(int(own.sum()), dtype=torch.int32))
        singles.append(renderer.loss(renderer(volume[b : b + 1], alone, jitter[own]), alone))
    for name, value in losses.items():
        torch.testing.assert_close(value, (singles[0][name] + singles[1][name]) / 2, rtol=1e-5, atol=0)


def test_losses_by_hand():
    """In units of 8 m: target depth of ray 0 is 4 m = 0.5, truncation 1.6 m = 0.2; ray 1 has no depth; ray 2 misses."""
    cfg = replace(
        SMALL, truncation=1.6, points_weight=3.0, rgb_weight=2.0, depth_weight=8.0, sdf_weight=1.0, eikonal_weight=1.0,
        features_weight=5.0,
    )  # fmt: skip
    renderer = Renderer(cfg, SMALL_GRID, feature_channels=2)
    out = renderer(torch.zeros(1, 8, 4, 8, 8), random_scene(B=1, per_sample=(3,))[1])
    out = replace(
        out,
        rgb=torch.tensor([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]),
        depth=torch.tensor([3.0, 7.0, 9.0]),
        starts=torch.tensor([[0.1, 0.25, 0.4, 0.6, 0.9]]).expand(3, 5),
        sdf=torch.tensor([[0.3, 0.15, 0.2, -0.2, -9.0]]).expand(3, 5),
        gradient=torch.tensor([3.0, 0.0, 4.0]).expand(3, 5, 3),
        of_volume=torch.tensor([[1.0, 1.0, 0.0]]),
        points_sdf=torch.tensor([0.5, -0.25, 100.0]),
        points_of_volume=torch.tensor([[1.0, 1.0, 0.0]]),
        features=torch.tensor([[4.0, 3.0], [9.0, 9.0], [9.0, 9.0]]),
    )
    rays = Rays(
        origins=torch.zeros(3, 3), directions=torch.zeros(3, 3), depth=torch.tensor([4.0, -1.0, 4.0]),
        rgb=torch.tensor([[0.5, 0.25, 1.0], [0.0, 0.0, 0.3], [0.0, 0.0, 0.0]]), volume_idx=torch.zeros(3).int(),
        features=torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]]),  # ray 1 has none
    )  # fmt: skip
    expected = {
        "rgb": 2 * (0.25 + 0.5 + 0.3) / 6,
        "depth": 8.0 * (4 - 3) / 8,  # weight 8; 1 m is 1 / 8 unit
        "free_space": 0.05 / 2,  # starts 0.1 and 0.25 lie before 0.3: relu(0.2 - 0.3), relu(0.2 - 0.15)
        "sdf": (0.1 + 0.1) / 2,  # |0.4 + 0.2 - 0.5|, |0.6 - 0.2 - 0.5|
        "eikonal": (5 - 1) ** 2,
        "points": 3 * (0.5 + 0.25) / 2,
        "features": 5 * (1 - 3 / 5),
    }
    losses = renderer.loss(out, rays)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name
    renderer.cfg = replace(cfg, features_loss="l1")
    assert renderer.loss(out, rays)["features"].item() == pytest.approx(5 * (4 + 1) / 2, rel=1e-6)


def test_points_loss_is_the_mean_distance_at_lidar_points():
    """The mean |SDF| at the points of each sample, averaged over samples; index -1: not used. Its gradient reaches the
    volumes of both samples."""
    volume, rays = random_scene()
    volume.requires_grad_()
    renderer = Renderer(replace(SMALL, points_weight=1.0), SMALL_GRID)
    position, idx = torch.rand(7, 3) * 4 - 2, torch.tensor([0, 0, 0, 1, 1, -1, -1]).int()
    out = renderer(volume, rays, points=(position, idx))
    sdf = renderer.field.sdf(
        volume.permute(0, 2, 3, 4, 1), (position * SMALL_GRID.scale)[:, None], idx.clamp(min=0)
    )[:, 0].abs()  # fmt: skip
    loss = renderer.loss(out, rays)["points"]
    torch.testing.assert_close(loss, (sdf[:3].mean() + sdf[3:5].mean()) / 2)
    assert torch.autograd.grad(loss, volume)[0].abs().amax(dim=(1, 2, 3, 4)).min() > 0
    with pytest.raises(AssertionError, match="needs points"):
        renderer.loss(renderer(volume, rays), rays)


@pytest.mark.parametrize("method", ["neus", "volsdf", "unisurf"])
def test_features_are_those_of_all_samples_and_of_the_background(method):
    """In fp64: the head at every sample, summed with the weights, and its bias for what passes the last one."""
    volume, rays = random_scene(dtype=torch.float64)
    rays = replace(rays, origins=torch.where(torch.arange(len(rays))[:, None] < 2, 30.0, rays.origins))  # two miss
    cfg = replace(SMALL, method=method, search=16, features_weight=1.0)
    renderer = Renderer(cfg, SMALL_GRID, feature_channels=70).double()
    assert renderer(volume, rays).features is None  # the rays have no targets
    rays = replace(rays, features=torch.randn(len(rays), 70, dtype=torch.float64))
    out, head, field = renderer(volume, rays), renderer.feature_head, renderer.field
    points = rays.origins[:, None] * SMALL_GRID.scale + rays.directions[:, None] * out.starts[..., None]
    features, _ = trilinear(volume.permute(0, 2, 3, 4, 1), field.cells(points), rays.volume_idx)
    of_samples = (out.weights[..., None] * head(features)).sum(dim=1)
    passed = 1 - out.weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(out.features, of_samples + passed * head.bias, rtol=1e-10, atol=1e-10)
    assert not out.hit[:2].any() and (out.features[:2] == head.bias).all()
    # it teaches the geometry too
    (d_bias,) = torch.autograd.grad(renderer.loss(out, rays)["features"], renderer.field.sdf_decoder.lin0.bias)
    assert d_bias.any()


@pytest.mark.parametrize("method", ["neus", "volsdf", "unisurf"])
def test_only_jitter_moves_samples(method):
    volume, rays = random_scene()
    renderer = Renderer(replace(SMALL, method=method, search=16), SMALL_GRID)
    first, again = renderer(volume, rays), renderer(volume, rays)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("rgb", "depth", "starts"))
    assert first.starts.shape == (len(rays), SMALL.samples + SMALL.importance)
    jitter = torch.rand(len(rays), renderer.jitters)
    moved, again = renderer(volume, rays, jitter), renderer(volume, rays, jitter)
    assert torch.equal(moved.starts, again.starts) and not torch.equal(moved.starts, first.starts)
    for out in (first, moved):
        assert (out.starts.diff(dim=1) >= 0).all() and torch.isfinite(out.depth).all()


def test_autocast_has_no_effect():
    volume, rays = random_scene()
    renderer = Renderer(SMALL, SMALL_GRID)
    without = renderer.loss(renderer(volume, rays), rays)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = renderer.loss(renderer(volume, rays), rays)
    assert all(torch.equal(without[name], under_autocast[name]) for name in without)
    assert renderer(volume.bfloat16(), rays).rgb.dtype == torch.float32


@pytest.mark.parametrize("method", ["neus", "volsdf", "unisurf"])
def test_kernels_render_what_the_references_render(method, device, monkeypatch):
    """In fp64, since rounding in fp32 may move samples. So the ops run one by one: the fused op has no fp64."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    volume, rays = random_scene(per_sample=(2, 3), dtype=torch.float64)
    renderer = Renderer(replace(SMALL, method=method, search=16), SMALL_GRID).double()
    jitter = torch.rand(len(rays), renderer.jitters, dtype=torch.float64)

    def render_and_backward(device):
        net, leaf = renderer.to(device), volume.detach().to(device).requires_grad_()
        device_rays = rays.each(lambda tensor: tensor.to(device))
        out = net(leaf, device_rays, jitter.to(device))
        losses = net.loss(out, device_rays)
        return {"rgb": out.rgb, "depth": out.depth, "starts": out.starts} | gradients(losses, net, leaf)

    expected = render_and_backward("cpu")
    monkeypatch.setattr(backend, "interpret", not HAS_GPU)  # without a GPU, kernels run in the interpreter from here on
    with launches() as names:
        computed = render_and_backward(device)
    assert {"_clip_rays_kernel", "_trilinear_fwd_kernel", "_trilinear_bwd_kernel", "_composite_bwd_kernel"} <= {*names}
    for name, value in expected.items():
        assert_close_to_max(computed[name].cpu(), value, 1e-4, name)


def test_unknown_method_is_rejected():
    with pytest.raises(ValueError, match="no renderer 'nerf': choose neus, volsdf, unisurf"):
        Renderer(replace(SMALL, method="nerf"), SMALL_GRID)
