"""The loss `photometric`: patches of rays, the frames that they are looked for in, and training without LiDAR."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from tests.test_camera_sweeps import sensor2global
from tests.test_rays import make_batch, seeded_generators
from unipad.batch import CAMERAS
from unipad.config import Augment, Data, RayChoice
from unipad.data import synthetic
from unipad.data.collate import collate
from unipad.data.nuscenes import NuScenesDataset
from unipad.errors import UserError
from unipad.kernels.warp import warp
from unipad.model.photometric import Images, Sources, photometric_error, sources_of
from unipad.model.rays import Rays, choose_rays, middle_rays, rays_per_sample
from unipad.recipes import PRETRAIN

VERSION, KEYFRAMES = "v1.0-mini", 3
BOTH = Data(sweeps=0, sources=(-1, 2))


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A synthetic dataset with two camera sweeps between keyframes and no LiDAR sweeps."""
    root = tmp_path_factory.mktemp("data") / "city"
    settings = {"scenes": 2, "keyframes": KEYFRAMES, "image_size": (72, 128), "columns": 90, "sweeps": 0}
    return synthetic.generate(root, **settings, camera_sweeps=2, workers=1, progress=False)


# Patches


def test_patches_are_squares_of_pixels_below_the_sky():
    batch = make_batch([[], []], size=(32, 64), unpadded=(30, 50))
    cfg = RayChoice(strategy="patch", per_view=4, patch=3, sky=0.4)
    rays = choose_rays(batch, cfg, seeded_generators(0, 1))
    assert len(rays) == 2 * 2 * 36
    middle = middle_rays(rays, cfg)
    assert torch.equal(middle.rgb, rays.rgb.view(-1, 9, 3)[:, 4]) and rays_per_sample(batch, cfg) == 2 * 4
    # the color of the pixel in row i and column j of view n is (j / 32, i / 16, n), see `make_batch`
    column, row, view = (rays.rgb * torch.tensor([32.0, 16, 1])).view(2, 2, 4, 9, 3).unbind(-1)
    assert view[:, 0].eq(0).all() and view[:, 1].eq(1).all()
    across, down = column - column[..., :1], row - row[..., :1]
    assert across.flatten(0, 2).eq(torch.tensor([0.0, 1, 2] * 3)).all()
    assert down.flatten(0, 2).eq(torch.tensor([0.0] * 3 + [1] * 3 + [2] * 3)).all()
    assert row.min() >= 12 and row.max() <= 29 and column.max() <= 49  # 12: int(0.4 * 30)
    # through the center of the pixel: view 0 looks along +y, with focal length 10 and principal point (16, 8)
    d = rays.directions.view(2, 2, 36, 3)[:, 0]
    torch.testing.assert_close(10 * d[..., 0] / d[..., 1] + 16, column[:, 0].flatten(1) + 0.5)
    torch.testing.assert_close(-10 * d[..., 2] / d[..., 1] + 8, row[:, 0].flatten(1) + 0.5)
    again = choose_rays(batch, cfg, seeded_generators(0, 2))
    assert torch.equal(rays.rgb[:72], again.rgb[:72]) and not torch.equal(rays.rgb[72:], again.rgb[72:])


def test_patches_reach_every_place():
    batch = make_batch([[]], views=1, size=(32, 32), unpadded=(16, 16))
    rays = choose_rays(batch, RayChoice(strategy="patch", per_view=2000, sky=0.5), seeded_generators(0))
    places = {tuple(place) for place in rays.rgb.view(-1, 9, 3)[:, 0, :2].tolist()}
    assert places == {(u / 32, v / 16) for u in range(1, 13) for v in range(8, 13)}  # 1 pixel from the borders


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_patches_are_seen_in_their_own_image(step):
    """Also at its borders, in images averaged over squares, and whatever the rounding: all pixels count alike."""
    batch = make_batch([[]], size=(32, 64), unpadded=(31, 50))
    batch = replace(batch, source_images=batch.images, source_sizes=batch.image_sizes, lidar2source=batch.lidar2image)
    cfg = RayChoice(strategy="patch", per_view=500, patch_step=step, sky=0.0)
    rays, images = choose_rays(batch, cfg, seeded_generators(0)), sources_of(batch, cfg).keyframe
    bundle = rays.origins, rays.directions, rays.volume_idx
    _, seen = warp(torch.full((len(rays),), 7.0), bundle, images.pixels, images.projections, images.sizes)
    assert seen[: 9 * 500, 0].all() and seen[9 * 500 :, 1].all()
    assert rays.rgb[: 9 * 500, 0].min() == (step + 1) // 2 / 32  # as near to the border as that allows


def test_images_without_room_for_a_patch():
    batch = make_batch([[]], views=1, size=(32, 64), unpadded=(30, 50))
    with pytest.raises(UserError, match="images of 32 x 64 pixels have no room for a patch, which takes 112 x 112"):
        choose_rays(batch, RayChoice(strategy="patch", patch_step=28), seeded_generators(0))
    # among larger ones, which is known on the device alone: the patch ends where the image does
    batch = replace(batch, image_sizes=torch.tensor([[[12, 10]]]))
    rays = choose_rays(batch, RayChoice(strategy="patch", patch_step=8), seeded_generators(0))
    column, row, _ = (rays.rgb * torch.tensor([32.0, 16, 1])).unbind(-1)
    assert set(column.tolist()) == {0, 8, 9} and set(row.tolist()) == {0, 8, 11}


def test_a_patchs_pixels_have_lidar_depth_where_there_is_a_point():
    batch = make_batch([[0.0, 6.0, 2.0]], views=1, size=(32, 32), unpadded=(30, 30))  # falls into pixel (16, 8)
    rays = choose_rays(
        batch, RayChoice(strategy="patch", per_view=1000, sky=0.0, near_radius=0.0), seeded_generators(0)
    )
    there = (rays.rgb[:, :2] == torch.tensor([16 / 32, 8 / 16])).all(dim=1)
    assert there.any() and torch.equal(rays.depth > 0, there)


# The error

HEIGHT, WIDTH = 32, 48
INTRINSICS = torch.tensor([[30.0, 0, 24, 0], [0, 30, 16, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def texture(x, y):
    """[..., 3] colors of a point of a plane: waves of 1 to 4 m."""
    waves = [torch.sin(2 * x + y), torch.sin(y * 3 - x), torch.cos(1.5 * x + 4 * y)]
    return 0.5 + 0.4 * torch.stack(waves, dim=-1)


def view_of_plane(position, plane=10.0):
    """The image [H, W, 3] of the plane z = `plane`, from a camera at `position` (x, y, z) that looks along z."""
    x, y, z = position
    u, v = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT)[:, None] + 0.5
    scale = (plane - z) / 30
    return texture((u - 24) * scale + x, (v - 16) * scale + y)


def projection_of(position):
    pose = torch.eye(4)
    pose[:3, 3] = -torch.tensor(position)
    return INTRINSICS @ pose


def scene(positions, images=None, place=(20, 12)):
    """A patch of one camera at the origin, its first pixel at `place`, on the plane 10 m away; sources at `positions`.

    images: in place of those that a camera at each position takes."""
    at_origin = (0.0, 0.0, 0.0)
    images = [view_of_plane(p) for p in positions] if images is None else images
    i = torch.arange(9)
    u, v = place[0] + i % 3 + 0.5, place[1] + i // 3 + 0.5
    ends = torch.stack([(u - 24) / 30, (v - 16) / 30, torch.ones_like(u)], dim=1)
    length = ends.norm(dim=1)
    patch = Rays(
        origins=torch.zeros(len(u), 3),
        directions=ends / length[:, None],
        depth=10 * length,  # to the plane
        rgb=torch.zeros(len(u), 3),  # not read
        volume_idx=torch.zeros(len(u), dtype=torch.int32),
    )
    return patch, Sources(views([at_origin], [view_of_plane(at_origin)]), views(positions, images))


def views(positions, images):
    sizes = torch.tensor([HEIGHT, WIDTH]).expand(1, len(positions), 2)
    return Images(torch.stack(images)[None], torch.stack([projection_of(p) for p in positions])[None], sizes)


def truth(patches):
    """[P] depths of the middle rays."""
    return patches.depth[4::9]


def twice(patches):
    return patches.each(lambda tensor: torch.cat([tensor, tensor]))


def error_at(depth, patches, sources, hit=None):
    hit = torch.ones(len(depth), dtype=torch.bool) if hit is None else hit
    return photometric_error(depth, hit, patches, sources)


ASIDE = (0.5, 0.0, 0.0)  # at 10 m, 0.5 m move a point by 1.5 pixels


def test_the_error_is_least_at_the_true_depth_and_leads_there():
    patch, sources = scene([ASIDE, (-0.5, 0.0, 0.0)])
    at_truth, counted = error_at(truth(patch), patch, sources)
    assert counted.all() and at_truth < 0.02
    for scale in (0.8, 0.9, 1.1, 1.25):
        depth = (scale * truth(patch)).requires_grad_()
        error, _ = error_at(depth, patch, sources)
        assert error > at_truth
        assert torch.autograd.grad(error.sum(), depth)[0].sign() == (1 if scale > 1 else -1)


def test_the_error_by_hand():
    """A patch of gray levels 0.4, 0.6, 0.4 in each row, mean 7 / 15 and variance 2 / 225, of which the source shows a
    plain 0.5, except in the same place. Another source shows white. No depth looks distinctly better."""
    image = torch.full((HEIGHT, WIDTH, 3), 0.6)
    image[:, ::2] = 0.4  # the patch begins in an even column, 20
    source = torch.full_like(image, 0.5)
    source[:, 20:23] = 1 - image[:, 20:23]  # unmoved, it looks worse
    aside = (4 / 3, 0.0, 0.0)  # 4 pixels
    patch, sources = scene([aside, aside], [source, torch.ones_like(source)])
    sources = replace(sources, keyframe=replace(sources.keyframe, pixels=image[None, None]))
    error, counted = error_at(truth(patch), patch, sources)
    mean, variance = 7 / 15, 2 / 225
    ssim = (2 * 0.5 * mean + 0.01**2) / (0.5**2 + mean**2 + 0.01**2) * 0.03**2 / (variance + 0.03**2)
    assert counted.all()
    torch.testing.assert_close(error, torch.tensor([0.85 * (1 - ssim) / 2 + 0.15 * 0.1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0.05, 0.25, 0.5, 2.0, 5.0])  # at 0.05, no source sees the patch
def test_a_wrong_depth_is_pulled_to_one_that_looks_distinctly_better(scale):
    """From beyond the reach of the gradients, and also from where the patch looks more alike unmoved."""
    patch, sources = scene([ASIDE, (-0.5, 0.0, 0.0)])
    depth = (scale * truth(patch)).requires_grad_()
    error, counted = error_at(depth, patch, sources)
    assert counted.all()
    assert error.item() == pytest.approx(abs(math.log(scale)), abs=0.1)  # depths that are tried are 12 % apart
    assert torch.autograd.grad(error, depth)[0].item() == pytest.approx((1 if scale > 1 else -1) / depth.item())


def test_nothing_pulls_where_every_depth_looks_alike():
    plain = torch.full((HEIGHT, WIDTH, 3), 0.5)
    noisy = [plain + 1e-3 * torch.rand(HEIGHT, WIDTH, 3) for _ in range(2)]
    patch, sources = scene([ASIDE, (-0.5, 0.0, 0.0)], noisy)
    sources = replace(sources, keyframe=replace(sources.keyframe, pixels=plain[None, None]))
    error, _ = error_at(4 * truth(patch), patch, sources)
    assert error.item() < 0.01


def test_a_better_look_in_one_source_alone_does_not_pull():
    """Two must show it, where there are two."""
    for others, pulls in (([ASIDE], True), ([ASIDE, (-0.5, 0.0, 0.0)], False)):
        images = [view_of_plane(ASIDE), torch.rand(HEIGHT, WIDTH, 3)][: len(others)]
        patch, sources = scene(others, images)
        error, _ = error_at(3 * truth(patch), patch, sources)
        assert (error.item() > 0.8) == pulls


def test_the_best_source_counts_alone():
    """A source in which the patch is hidden changes nothing: neither the error nor the gradient."""
    hidden = torch.rand(HEIGHT, WIDTH, 3)
    depths, results = [], []
    for images in ([view_of_plane(ASIDE)], [hidden, view_of_plane(ASIDE)]):
        patch, sources = scene([ASIDE] * len(images), images)
        depths.append((1.03 * truth(patch)).requires_grad_())  # no depth that is tried is nearer to the truth
        error, counted = error_at(depths[-1], patch, sources)
        assert counted.all()
        results.append((error, *torch.autograd.grad(error.sum(), depths[-1])))
    torch.testing.assert_close(results[0], results[1])


def test_what_does_not_move_in_the_image_is_not_counted():
    """A car at rest, the sky, or what moves with the car: the source shows the same pixels in the same place."""
    same = view_of_plane((0.0, 0.0, 0.0))
    patch, sources = scene([ASIDE, ASIDE], [view_of_plane(ASIDE), same])
    error, counted = error_at(1.2 * truth(patch), patch, sources)
    assert not counted.any() and not error.any()


def test_the_same_place_in_a_smaller_image():
    """Of a car at rest, whose camera's images are stored in half the size between keyframes."""
    at_origin = (0.0, 0.0, 0.0)
    for position, moves in ((at_origin, False), (ASIDE, True)):
        patch, sources = scene([ASIDE])
        half = torch.nn.functional.avg_pool2d(view_of_plane(position).permute(2, 0, 1), 2).permute(1, 2, 0)
        projections = torch.diag(torch.tensor([0.5, 0.5, 1, 1])) @ projection_of(ASIDE)
        others = Images(half[None, None], projections[None, None], sources.others.sizes // 2)
        _, counted = error_at((1.0 if moves else 1.3) * truth(patch), patch, replace(sources, others=others))
        assert counted.all() if moves else not counted.any()


def test_only_a_rays_own_camera_says_what_does_not_move():
    """Two cameras in the same place: what the second one sees unmoved counts for its own rays alone."""
    same = view_of_plane((0.0, 0.0, 0.0))
    patch, sources = scene([ASIDE, ASIDE], [view_of_plane(ASIDE), same])
    keyframe = views([(0.0, 0.0, 0.0), (50.0, 0.0, 0.0)], [same, same])
    # the second camera is 50 m aside, where it sees nothing of the first one's patch; it has the first one's rays,
    # moved there
    moved = patch.origins + torch.tensor([50.0, 0, 0])
    patches = replace(twice(patch), origins=torch.cat([patch.origins, moved]))
    others = views([ASIDE, (50.5, 0.0, 0.0)], [view_of_plane(ASIDE), same])
    _, counted = error_at(1.2 * truth(patches), patches, replace(sources, keyframe=keyframe, others=others))
    assert counted.tolist() == [True, False]


def test_another_camera_of_the_keyframe_is_a_source():
    """Where views overlap; here the frames before and after are missing."""
    patch, sources = scene([ASIDE])
    keyframe = views([(0.0, 0.0, 0.0), ASIDE], [view_of_plane((0.0, 0.0, 0.0)), view_of_plane(ASIDE)])
    others = replace(keyframe, sizes=torch.zeros(1, 2, 2, dtype=torch.int64))
    patches = twice(patch)
    error, counted = error_at(truth(patches), patches, Sources(keyframe, others))
    assert counted[0] and error[0] < 0.02


@pytest.mark.parametrize("step", [2, 4])
def test_coarse_patches_are_read_from_averaged_images(step):
    """Of averages over squares the error at the true depth is small too, and images of one color stay so."""
    batch = make_batch([[]], views=1, size=(32, 64), unpadded=(30, 50))
    others = dict(
        source_images=(255 * batch.images).to(torch.uint8),
        source_sizes=batch.image_sizes,
        lidar2source=batch.lidar2image,
    )
    batch = replace(batch, **others)
    cfg = RayChoice(strategy="patch", per_view=10, patch_step=step, sky=0.0)
    sources = sources_of(batch, cfg)
    assert sources.others.pixels.shape == (1, 1, 32 // step, 64 // step, 3)
    assert sources.others.sizes.tolist() == [[[30 // step, 50 // step]]]
    mean = batch.images[0, 0, :, :step, step : 2 * step].mean(dim=(1, 2))
    torch.testing.assert_close(sources.keyframe.pixels[0, 0, 0, 1], mean)
    torch.testing.assert_close(sources.others.pixels[0, 0, 0, 1], mean, atol=1 / 255, rtol=0)
    rays = choose_rays(batch, cfg, seeded_generators(0))
    column, row, _ = (rays.rgb * torch.tensor([32.0, 16, 1])).view(10, 9, 3).unbind(-1)
    assert column[:, 1].sub(column[:, 0]).eq(step).all() and row[:, 3].sub(row[:, 0]).eq(step).all()
    # a color read at the end of a ray is that of its pixel: it grows by 1 / 32 per column and 1 / 16 per row
    bundle = rays.origins, rays.directions, rays.volume_idx
    images = sources.keyframe
    colors, seen = warp(torch.full((90,), 7.0), bundle, images.pixels, images.projections, images.sizes)
    expected = torch.stack([column.flatten() / 32, row.flatten() / 16], dim=1)
    assert seen.all()
    torch.testing.assert_close(colors[seen][:, :2], expected[seen[:, 0]], atol=1e-4, rtol=0)


def test_a_patch_counts_only_where_it_is_seen_whole():
    patch, sources = scene([ASIDE])
    # without such a frame; with a smaller image, in which the patch of rows 12 to 14 is cut off
    for size in ([0, 0], [13, WIDTH]):
        others = replace(sources.others, sizes=torch.tensor([[size]]))
        error, counted = error_at(truth(patch), patch, replace(sources, others=others))
        assert not counted.any() and not error.any()
    depth = torch.zeros(1, requires_grad=True)  # of a ray that crosses no volume
    error, counted = error_at(depth, patch, sources, hit=torch.tensor([False]))
    assert not counted.any() and not torch.autograd.grad(error.sum(), depth)[0].any()  # nor is it NaN
    # of a diverged model: must not be hidden
    error, counted = error_at(torch.tensor([torch.nan]), patch, sources)
    assert counted.all() and error.isnan().all()


# The frames


def test_sources_are_the_frames_around_the_keyframe(city):
    """Files, poses and projections match the devkit's tables; a scene's ends have frames on one side only."""
    from nuscenes import NuScenes

    nusc = NuScenes(VERSION, str(city), verbose=False)
    dataset = NuScenesDataset(city, VERSION, "mini_val", BOTH)
    present = []
    for i in range(KEYFRAMES):
        sample = dataset[i]
        assert len(sample.images) == 6 and sample.points.shape == (0, 5) and sample.point_labels is None
        lidar = nusc.get("sample_data", nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
        for m, (offset, camera) in enumerate((offset, camera) for offset in BOTH.sources for camera in CAMERAS):
            record = nusc.get("sample_data", nusc.get("sample", sample.token)["data"][camera])
            for _ in range(abs(offset)):
                token = record and record["next" if offset > 0 else "prev"]
                record = nusc.get("sample_data", token) if token else None
            assert dataset.source_index.image_files[i, m].decode() == (record["filename"] if record else "")
            assert sample.source_images[m].shape == ((72, 128, 3) if record else (0, 0, 3))
            present.append(record is not None)
            if record:
                intrinsic = np.eye(4)
                sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
                intrinsic[:3, :3] = sensor["camera_intrinsic"]
                projection = intrinsic @ np.linalg.inv(sensor2global(nusc, record)) @ sensor2global(nusc, lidar)
                np.testing.assert_allclose(sample.lidar2source[m], projection, atol=1e-2, rtol=1e-5)
    assert np.array(present).reshape(KEYFRAMES, 2, 6).all(axis=2).tolist() == [
        [False, True],
        [True, True],
        [True, False],
    ]
    batch = collate([dataset[0], dataset[1]])
    assert batch.source_images.shape == (2, 12, 3, 96, 128) and batch.source_images.dtype == torch.uint8
    assert batch.source_sizes[0, :, 0].tolist() == [0] * 6 + [72] * 6
    assert batch.to("cpu").keyframe().source_images.dtype == torch.uint8


def test_next_is_not_read(city, tmp_path):
    """Other converters leave it empty: frames after the keyframe are those whose `prev` leads there."""
    root = shutil.copytree(city, tmp_path / "city", ignore=shutil.ignore_patterns("unipad-index"))
    table = root / VERSION / "sample_data.json"
    table.write_text(json.dumps([{**row, "next": "unknown"} for row in json.loads(table.read_text())]))
    files = [NuScenesDataset(r, VERSION, "mini_val", BOTH).source_index.image_files for r in (city, root)]
    assert np.array_equal(*files) and (files[0][:, 6:] != b"").any()


def test_sources_of_camera_sweeps_are_the_keyframes(city):
    data = Data(sweeps=0, sources=(-1,), camera_sweeps=2)
    dataset = NuScenesDataset(city, VERSION, "mini_val", data)
    batch = collate([dataset[1]]).to("cpu")
    assert batch.images.shape[1] == 12
    sources = sources_of(batch.keyframe(), RayChoice(strategy="patch", patch_step=2))
    assert sources.keyframe.pixels.shape == sources.others.pixels.shape == (1, 6, 48, 64, 3)


def test_points_look_alike_in_the_keyframe_and_its_sources(city):
    """At their true depths, pixels of LiDAR points have a smaller error than at others, and augmentation changes
    neither."""
    data = Data(image_size=(144, 256), sources=(-1, 1))
    errors, ends = {}, {}
    for name, vary in (("plain", None), ("moved", Augment(rotation=0.4, scale=(1.1, 1.1), flip_x=1.0))):
        dataset = NuScenesDataset(city, VERSION, "mini_val", data, augment=vary)
        batch = collate([dataset.read(1, None if vary is None else np.random.default_rng(0))]).to("cpu")
        cfg = RayChoice(strategy="patch", per_view=3000, patch_step=2, sky=0.0)
        patches, sources = choose_rays(batch, cfg, seeded_generators(0)), sources_of(batch, cfg)
        # of each view, 60 patches that have a point in the middle, if there are as many
        index = (truth(patches) > 0).view(6, 3000).byte().topk(60, dim=1).indices + 3000 * torch.arange(6)[:, None]
        patches = patches[(9 * index.flatten()[:, None] + torch.arange(9)).flatten()]
        points = torch.nn.functional.pad(batch.points[:, :3], (0, 1), value=1.0)
        u, v, d, _ = torch.einsum("mij,pj->imp", batch.lidar2source[0].double(), points.double())
        ends[name] = torch.stack([u / d, v / d], dim=-1)[d > 3]
        assert sources.keyframe.pixels.shape[1] == 6 and sources.others.pixels.shape[1] == 12
        known = truth(patches) > 0
        for scale in (0.7, 1.0, 1.4):
            error, counted = error_at(scale * truth(patches), patches, sources, hit=known)
            errors[name, scale] = error[counted].mean().item()
            assert counted.sum() > 50
        assert errors[name, 1.0] < 0.8 * min(errors[name, 0.7], errors[name, 1.4])
    torch.testing.assert_close(ends["moved"], ends["plain"], rtol=1e-5, atol=1e-3)  # pixels
    for scale in (0.7, 1.0, 1.4):
        assert errors["moved", scale] == pytest.approx(errors["plain", scale], rel=0.2)


def test_a_dataset_without_sources_is_refused():
    with pytest.raises(UserError, match="does not read --data.sources"):
        sources_of(make_batch([[]]), RayChoice(strategy="patch"))
    batch = make_batch([[]])
    one = dict(source_images=batch.images[:, :1], source_sizes=batch.image_sizes[:, :1])
    with pytest.raises(UserError, match="1 source images are not some frames of 2 cameras"):
        sources_of(replace(batch, **one, lidar2source=batch.lidar2image[:, :1]), RayChoice(strategy="patch"))


# Training

FLAGS = ["--modality", "camera", "--preset", "images-tiny", "--data-root", "ROOT", "--device", "cpu", "--workers", 0]
FLAGS += ["--steps", 2, "--log-every", 1, "--val-samples", 2, "--picture-stride", 8, "--data.image-size", 64, 96]
FLAGS += ["--render.samples", 8, "--render.importance", 4]


FLAGS_OF_LIDAR = ["--modality", "lidar", "--preset", "tiny", "--rays.strategy", "patch", "--data.sources", -1, 1]
FLAGS_OF_LIDAR += ["--render.rgb-weight", 0, "--render.photometric-weight", 10]


def train_on(root, out, *flags):
    """The rows of log.jsonl of a short run."""
    args = [root if flag == "ROOT" else flag for flag in (*FLAGS, "--out", out, *flags)]
    train.main(train.parse(args))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_reads_no_lidar(city, tmp_path, capsys):
    """All LiDAR files of the training scene are gone, then those for validation too: then it has no depth metrics."""
    root = shutil.copytree(city, tmp_path / "city", ignore=shutil.ignore_patterns("unipad-index"))
    shutil.rmtree(root / "lidarseg")
    (root / VERSION / "lidarseg.json").unlink()
    for file in NuScenesDataset(root, VERSION, "mini_train", Data()).index.lidar_files:
        (root / file.decode()).unlink()
    rows = train_on(root, tmp_path / "run")
    assert any("train/photometric" in row for row in rows) and not any("train/depth" in row for row in rows)
    assert any("val/depth_abs_rel" in row and "val/psnr" in row for row in rows)
    assert "left out" not in capsys.readouterr().err
    first, *others = sorted((root / "samples" / "LIDAR_TOP").iterdir())
    assert NuScenesDataset.has_points(root, VERSION, "mini_val") and others
    first.unlink()
    assert not NuScenesDataset.has_points(root, VERSION, "mini_val")  # images alone, not the few frames that have some
    shutil.rmtree(root / "samples" / "LIDAR_TOP")
    rows = train_on(root, tmp_path / "without")
    assert any("val/psnr" in row for row in rows) and not any("val/depth_abs_rel" in row for row in rows)
    rows = train_on(root, tmp_path / "nothing", "--render.rgb-weight", 0)  # nothing to measure, but it trains
    assert any("train/photometric" in row for row in rows) and not any("val/psnr" in row for row in rows)


def test_the_summary_has_what_was_measured_before_and_after(tmp_path):
    """LiDAR files may be gone when a run is resumed."""
    metrics = {"before": {"psnr": 1.0, "depth_rmse": 2.0}, "after": {"psnr": 3.0}}
    assert "psnr" in (text := train.summary(metrics, tmp_path)) and "depth" not in text


def test_rays_from_the_lidar_have_no_patches():
    recipe = train.parse(FLAGS_OF_LIDAR).recipe
    with pytest.raises(UserError, match="--render.photometric-weight 0"):
        train.with_ray_origins(recipe, has_images=False, print0=print)
    assert train.with_ray_origins(recipe, has_images=True, print0=print) == recipe


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data.sources", 1, 1], "distinct frame offsets"),
        (["--data.sources", 0], "distinct frame offsets"),
        (["--data.sources", 13], "distinct frame offsets"),
        (["--rays.patch", 4], "must be odd"),
        (["--rays.patch-step", 200], "images of 128 x 224 pixels have no room for a patch"),
        (["--rays.strategy", "random"], "--rays.strategy patch"),
        (["--render.depth-weight", 1], "--render.depth-weight 0"),
        (["--render.photometric-weight", 0], "--data.sources has no effect"),
        (["--augment.grid-mask", 0.5], "--augment.grid-mask"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse(["--modality", "camera", "--preset", "images-tiny", *flags])


def test_recipes_of_images_have_no_lidar_loss():
    for recipe in (PRETRAIN["camera"]["images-tiny"], PRETRAIN["camera"]["camera-0.1-images"]):
        assert recipe.data.sweeps == 0 and recipe.render.photometric_weight > 0
        weights = [getattr(recipe.render, f"{name}_weight") for name in ("depth", "free_space", "sdf", "points")]
        assert not any(weights) and not recipe.camera.depth_weight
