"""Which rays are cast, and their origins, directions, depths and colors."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.golden import assert_close_to_max, load
from unipad.batch import Batch
from unipad.config import RayChoice
from unipad.model.rays import (
    cast_rays,
    choose_rays,
    lidar_rays,
    pixel_grid,
    pixel_rays,
    project_points,
    rays_per_sample,
)

ALL_RADII = RayChoice(per_view=8, near_radius=0.0, far_radius=1e3)
FOCAL = 10.0  # pixels


def make_batch(point_lists, views=2, size=(16, 32), unpadded=(12, 30)):
    """View 0 looks along +y from (0, 1, 2), view 1 along -y from there; principal point (16, 8), focal length 10.

    The pixel in row i and column j of a view has the color (j / 32, i / 16, index of the view).

    point_lists: x, y, z of each sample's points. size, unpadded: (height, width) with and without padding.
    """
    intrinsics = torch.tensor([[FOCAL, 0, 16, 0], [0, FOCAL, 8, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    forward = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 2], [0, 1, 0, -1], [0, 0, 0, 1]])
    backward = torch.tensor([[-1.0, 0, 0, 0], [0, 0, -1, 2], [0, -1, 0, 1], [0, 0, 0, 1]])
    B = len(point_lists)
    lidar2camera = torch.stack([forward, backward][:views]).expand(B, views, 4, 4)
    (H, W), none = size, torch.zeros(0)
    rows, cols = torch.arange(H)[:, None] / 16, torch.arange(W) / 32
    images = [torch.stack([cols.expand(H, W), rows.expand(H, W), torch.full((H, W), float(n))]) for n in range(views)]
    # intensity and time lag are 0
    points = [torch.nn.functional.pad(torch.as_tensor(p).reshape(-1, 3), (0, 2)) for p in point_lists]
    return Batch(
        images=torch.stack(images).expand(B, -1, -1, -1, -1),
        image_sizes=torch.tensor(unpadded).expand(B, views, 2),
        lidar2image=intrinsics @ lidar2camera,
        lidar2camera=lidar2camera,
        points=torch.cat(points),
        point_counts=torch.tensor([len(p) for p in points]),
        boxes=none,
        labels=none,
        box_counts=none,
        point_labels=None,
        tokens=("",) * B,
    )


def seeded_generators(*seeds):
    """One generator per sample, each with its seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def point_cloud(count, seed=0):
    """Random points in all directions, each visible in one of the two views or in none."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, generator=generator) - 0.5) * torch.tensor([20.0, 20.0, 6.0])


def test_rays_match_the_original():
    arrays, meta = load("sample_rays_default")
    cfg = RayChoice(per_view=64, near_radius=3.0, far_radius=100.0)
    scale = 1 / max(map(abs, meta["pc_range"]))  # the record's lengths are meters * scale
    lidar2image, lidar2camera = arrays["in/lidar2img"][:, :, 0], arrays["in/lidar2cam"][:, :, 0]  # of the keyframe
    batch = replace(
        make_batch([[], []]),
        images=arrays["in/raw_image_uint8"].float() / 255,
        image_sizes=arrays["in/pad_before_shape"][..., :2],
        lidar2image=lidar2image,
        lidar2camera=lidar2camera,
    )
    H, W = batch.images.shape[-2:]
    # what the original drew: for each of 2 x 6 views, indices of LiDAR points, then of pixels
    drawn = iter(arrays[f"in/choice_{i}"] for i in range(2 * 6 * 2))
    for b in range(2):
        points = arrays[f"in/points_{b}"][:, :3]
        radius = points[:, :2].norm(dim=1)
        points = points[(radius > cfg.near_radius) & (radius < cfg.far_radius)]
        assert_close_to_max(points * scale, arrays[f"out/scaled_points_{b}"], 1e-7)
        projected, visible = project_points(points, lidar2image[b], batch.image_sizes[b])
        pixels, inside = pixel_grid(batch.image_sizes[b], H, W, cfg.pixel_interval, cfg.sky)
        chosen = [
            torch.cat([projected[n][visible[n]][next(drawn)], pixels[n][inside[n]][next(drawn)]])
            for n in range(len(projected))
        ]
        rays = cast_rays(batch, b, torch.stack(chosen))
        assert_close_to_max(rays.origins * scale, arrays[f"out/ray_o_{b}"], 1e-6)
        assert_close_to_max(rays.directions, arrays[f"out/ray_d_{b}"], 1e-6)
        assert_close_to_max(rays.rgb, arrays[f"out/rgb_{b}"], 1e-6)
        depth = torch.where(rays.depth > 0, rays.depth * scale, -1.0)
        assert torch.equal(depth > 0, arrays[f"out/depth_{b}"][:, 0] > 0)
        assert_close_to_max(depth, arrays[f"out/depth_{b}"][:, 0], 1e-6)
        assert (rays.volume_idx == b).all()


def test_a_ray_to_a_point_on_the_optical_axis():
    """The point is 5 m ahead of the camera of view 0, which is at y = 1."""
    rays = lidar_rays(make_batch([[0.0, 6.0, 2.0]]), ALL_RADII, per_view=1, generators=seeded_generators(0))
    torch.testing.assert_close(rays.origins, torch.tensor([[0.0, 1.0, 2.0]]).expand(2, 3))
    torch.testing.assert_close(rays.directions[0], torch.tensor([0.0, 1.0, 0.0]))
    assert rays.depth.tolist() == [5.0, -1.0]  # view 1 looks the other way
    torch.testing.assert_close(rays.rgb[0], torch.tensor([16 / 32, 8 / 16, 0.0]))


def test_depth_is_the_distance_along_the_ray():
    """A point 3 m to the right and 4 m ahead of view 0 is 5 m away. Its pixel is (16 + 10 * 3 / 4, 8), truncated."""
    rays = lidar_rays(make_batch([[3.0, 5.0, 2.0]]), ALL_RADII, per_view=1, generators=seeded_generators(0))
    torch.testing.assert_close(rays.depth[0], torch.tensor(5.0))
    torch.testing.assert_close(rays.directions[0], torch.tensor([0.6, 0.8, 0.0]))
    torch.testing.assert_close(rays.rgb[0], torch.tensor([23 / 32, 8 / 16, 0.0]))


@pytest.mark.parametrize(
    "pixel, depth, visible",
    [
        ((1.0, 1.0), 1.0, True),
        ((0.0, 1.0), 1.0, False),  # on the left border
        ((1.0, 0.0), 1.0, False),  # on the top border
        ((29.0, 1.0), 1.0, False),  # on the last column: the width before padding is 30
        ((28.75, 10.75), 1.0, True),
        ((1.0, 11.0), 1.0, False),  # on the last row: the height is 12
        ((1.0, 1.0), -1.0, False),  # behind the camera
        ((16.0, 8.0), 0.0, False),  # at the camera itself
    ],
)
def test_only_points_strictly_inside_the_unpadded_image_are_visible(pixel, depth, visible):
    batch = make_batch([[]])
    x, z = (pixel[0] - 16) * depth / FOCAL, -(pixel[1] - 8) * depth / FOCAL
    lidar2image = batch.lidar2image[0, :1].double()
    point = torch.tensor([[x, depth + 1, z + 2]], dtype=torch.float64)
    projected, inside = project_points(point, lidar2image, batch.image_sizes[0, :1])
    assert inside.item() == visible
    if visible:
        torch.testing.assert_close(projected[0, 0], torch.tensor([*pixel, depth], dtype=torch.float64))


def test_radius_limits_are_strict():
    batch = make_batch([[[0.0, 3.0, 2.0], [0.0, 4.0, 2.0], [0.0, 5.0, 2.0]]], views=1)
    cfg = replace(ALL_RADII, near_radius=3.0, far_radius=5.0)
    rays = choose_rays(batch, cfg, seeded_generators(0))
    assert rays.depth[rays.depth > 0].tolist() == [3.0]  # only the point at radius 4, 3 m from the camera at y = 1


def test_rays_go_to_points_first_then_to_pixels_of_the_grid_below_the_sky():
    batch = make_batch([point_cloud(40)])
    _, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
    counts = visible.sum(1)
    cfg = replace(ALL_RADII, per_view=int(counts.max()) + 6, pixel_interval=3, sky=0.5)
    rays = choose_rays(batch, cfg, seeded_generators(0))
    depth, rgb = rays.depth.view(2, -1), rays.rgb.view(2, -1, 3)
    for n, count in enumerate(counts.tolist()):
        assert (depth[n, :count] > 0).all() and (depth[n, count:] == -1).all()
        columns, rows = rgb[n, count:, 0] * 32, rgb[n, count:, 1] * 16
        assert (columns % 3 == 0).all() and (columns < 30).all()
        assert set(rows.tolist()) <= {6.0, 9.0}  # every third row from int(0.5 * 12) to 11


def test_points_are_drawn_without_replacement():
    batch = make_batch([point_cloud(200)])
    _, visible = project_points(batch.points[:, :3], batch.lidar2image[0], batch.image_sizes[0])
    fewest = int(visible.sum(1).min())
    depth = choose_rays(batch, replace(ALL_RADII, per_view=fewest), seeded_generators(3)).depth.view(2, -1)
    for n in range(2):
        assert len(set(depth[n].tolist())) == fewest


def test_every_point_is_drawn_equally_often():
    """3 of 6 points are drawn 600 times: each point 300 times on average, with a standard deviation of 12."""
    points = torch.tensor([[x, 6.0, 2.0] for x in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5)])
    batch = make_batch([points] * 600, views=1)
    rays = choose_rays(batch, replace(ALL_RADII, per_view=3), seeded_generators(*range(600)))
    drawn = (rays.origins + rays.directions * rays.depth[:, None])[:, 0]  # x
    counts = (drawn[:, None] - points[:, 0]).abs().lt(1e-3).sum(0)
    assert counts.sum() == 600 * 3 and (counts - 300).abs().max() < 5 * 12


@pytest.mark.parametrize("points", [[], [[0.0, 6.0, 2.0]]], ids=["no points", "one, in the other view"])
def test_a_view_without_points_casts_pixels(points):
    """View 1 has no points; its rays are the last eight."""
    rays = choose_rays(make_batch([points]), ALL_RADII, seeded_generators(0))
    assert len(rays) == 16 and (rays.depth[8:] == -1).all()
    torch.testing.assert_close(rays.directions.norm(dim=1), torch.ones(16))
    assert (rays.rgb[:, 1] >= 4 / 16).all()  # from row int(0.4 * 12) on, 0.4 being the default `sky`


def test_a_view_with_fewer_pixels_than_rays_repeats_them():
    cfg = replace(ALL_RADII, per_view=11, pixel_interval=16)
    rays = choose_rays(
        make_batch([[]], views=1), cfg, seeded_generators(0)
    )  # the grid has two pixels: two columns of one row
    columns = rays.rgb[:, 0] * 32
    assert len(rays) == 11 and sorted((columns == x).sum().item() for x in (0, 16)) == [5, 6]


@pytest.mark.parametrize("strategy", ["depth", "random", "dilation"])
@pytest.mark.parametrize("views", [0, 2])
def test_rays_per_sample_is_the_number_of_chosen_rays(strategy, views):
    batch = make_batch([point_cloud(70, 1), point_cloud(110, 2)], views=2)
    if not views:
        batch = replace(batch, images=batch.images[:, :0])
    for dilation in (1, 3, 5):
        cfg = replace(ALL_RADII, strategy=strategy, dilation=dilation)
        assert len(choose_rays(batch, cfg, seeded_generators(1, 2))) == 2 * rays_per_sample(batch, cfg)


def test_rays_are_determined_by_the_generators():
    batch = make_batch([point_cloud(300)])
    for strategy in ("depth", "random", "dilation"):
        cfg = replace(ALL_RADII, strategy=strategy, dilation=2)
        first, again, other = (choose_rays(batch, cfg, seeded_generators(seed)) for seed in (5, 5, 6))
        assert torch.equal(first.directions, again.directions)
        assert not torch.equal(first.directions, other.directions)


@pytest.mark.parametrize("strategy", ["depth", "random", "dilation"])
def test_rays_of_a_sample_do_not_depend_on_the_others(strategy):
    clouds = [point_cloud(70, 1), point_cloud(110, 2)]
    cfg = replace(ALL_RADII, strategy=strategy)
    both = choose_rays(make_batch(clouds), cfg, seeded_generators(1, 2))
    half = len(both) // 2
    for b in range(2):
        alone = choose_rays(make_batch(clouds[b : b + 1]), cfg, seeded_generators(b + 1))
        own = both[b * half : (b + 1) * half]
        assert (own.volume_idx == b).all() and (alone.volume_idx == 0).all()
        for name in ("origins", "directions", "depth", "rgb"):
            assert torch.equal(getattr(own, name), getattr(alone, name)), name


@pytest.mark.parametrize("strategy", ["depth", "random", "dilation"])
def test_nothing_waits_for_the_gpu(strategy):
    """With fake tensors, an operator whose value or output size is needed on the host raises."""
    batch, mode = make_batch([point_cloud(9), point_cloud(5)]), FakeTensorMode(allow_non_fake_inputs=True)
    names = ("images", "image_sizes", "lidar2image", "lidar2camera", "points")
    fake = replace(batch, **{name: mode.from_tensor(getattr(batch, name)) for name in names})
    with mode:
        choose_rays(fake, replace(ALL_RADII, strategy=strategy), seeded_generators(0, 1))
        rays = lidar_rays(fake, ALL_RADII, per_view=8, generators=seeded_generators(0, 1))
        assert rays.directions.shape == (2 * 2 * 8, 3)  # samples * views * per_view
        # a wait would have been noticed
        with pytest.raises(DataDependentOutputException):
            rays.depth.max().item()


def test_random_pixels_cover_the_unpadded_image():
    cfg = replace(ALL_RADII, strategy="random", per_view=4000)
    rays = choose_rays(make_batch([[]], views=1), cfg, seeded_generators(0))
    columns, rows = (rays.rgb[:, 0] * 32).long(), (rays.rgb[:, 1] * 16).long()
    assert torch.equal(columns.unique(), torch.arange(30)) and torch.equal(rows.unique(), torch.arange(12))
    assert (rays.depth == -1).all()


def test_dilation_takes_every_pixel_of_its_grid():
    cfg = replace(ALL_RADII, strategy="dilation", dilation=5)
    rays = choose_rays(make_batch([[]], views=1), cfg, seeded_generators(0))
    # 4 x 7 pixels of the padded 16 x 32 image, of which 3 x 6 lie in the unpadded one: some of these are repeated
    assert len(rays) == 4 * 7
    pixels = {(round(u * 32), round(v * 16)) for u, v, _ in rays.rgb.tolist()}
    assert pixels == {(u, v) for u in range(0, 30, 5) for v in range(0, 12, 5)}


def test_pixels_get_the_depth_of_the_nearest_point_in_them():
    """Pixel (16, 8) of view 0 is on its optical axis; there is one point 9 m away, and one 4 m away slightly off it."""
    batch = make_batch([[[0.0, 10.0, 2.0], [0.2, 5.0, 1.9]]])
    cfg = replace(ALL_RADII, strategy="dilation", dilation=8)
    rays = choose_rays(batch, cfg, seeded_generators(0))
    on_axis = (rays.directions - torch.tensor([0.0, 1.0, 0.0])).norm(dim=1) < 1e-5
    assert on_axis.any() and (rays.depth[~on_axis] == -1).all()
    torch.testing.assert_close(rays.depth[on_axis], torch.full_like(rays.depth[on_axis], 4.0))


def test_lidar_rays_all_have_depth():
    batch = make_batch([point_cloud(30)])
    rays = lidar_rays(batch, ALL_RADII, per_view=50, generators=seeded_generators(0))
    assert len(rays) == 100 and (rays.depth > 0).all()
    ends = rays.origins + rays.directions * rays.depth[:, None]
    assert (ends[:, None] - batch.points[:, :3]).norm(dim=-1).amin(1).max() < 1e-4


def test_lidar_rays_of_an_empty_sample_have_no_depth():
    """Nor have those of view 1 of the other sample, whose point is in view 0."""
    batch = make_batch([[], [[0.0, 6.0, 2.0]]])
    rays = lidar_rays(batch, ALL_RADII, per_view=4, generators=seeded_generators(0, 1))
    assert rays.depth.tolist() == [-1.0] * 8 + [5.0] * 4 + [-1.0] * 4
    assert rays.directions.isfinite().all()


def test_pixel_rays_lie_on_the_grid():
    batch = make_batch([[], []])
    rays = pixel_rays(batch, sample=1, stride=5)
    assert len(rays) == 2 * 3 * 6  # views * rows * columns
    assert (rays.depth == -1).all() and (rays.volume_idx == 1).all()
    rgb = rays.rgb.view(2, 3, 6, 3)
    # view 1, row 2 * 5 and column 3 * 5; the color's last entry is the view
    torch.testing.assert_close(rgb[1, 2, 3], torch.tensor([15 / 32, 10 / 16, 1.0]))
    projected, _ = project_points(rays.origins + 7 * rays.directions, batch.lidar2image[1], batch.image_sizes[1])
    projected = projected.view(2, 2, 3, 6, 3)  # into each view, of the rays of each view
    torch.testing.assert_close(projected[1, 1, 2, 3, :2], torch.tensor([15.0, 10.0]))


def test_unknown_strategy_is_rejected():
    with pytest.raises(ValueError, match="no ray strategy 'all'"):
        choose_rays(make_batch([[]]), replace(ALL_RADII, strategy="all"), seeded_generators(0))


def test_without_cameras_rays_go_from_the_lidar_to_the_keyframes_points():
    points = torch.tensor([
        [6.0, 0, 8, 0, 0],  # radius 6, distance 10
        [0, 5, 0, 0, 0.05],  # lag > 0: from an earlier sweep
        [2, 0, 0, 0, 0],  # nearer than near_radius
        [0, -4, 3, 0, 0],  # radius 4, distance 5
    ])  # fmt: skip
    batch = replace(make_batch([[], []]), points=points, point_counts=torch.tensor([4, 0]))
    batch = replace(batch, images=batch.images[:, :0])
    cfg = RayChoice(per_view=3, lidar_per_view=3, near_radius=3.0, far_radius=50.0)
    rays = choose_rays(batch, cfg, seeded_generators(0, 1))
    assert len(rays) == 2 * 6 * 3 and not rays.origins.any()  # samples * 6 (as nuScenes' cameras) * per_view
    full, empty = rays[rays.volume_idx == 0], rays[rays.volume_idx == 1]
    ends = (full.directions * full.depth[:, None]).round(decimals=4)
    assert {tuple(e) for e in ends.tolist()} == {(6, 0, 8), (0, -4, 3)}
    assert (empty.depth == -1).all() and torch.allclose(empty.directions.norm(dim=1), torch.ones(6 * 3))
