"""Camera sweeps (images taken before the keyframe), from the tables to a detector.

The setting `Data.camera_sweeps` counts the keyframe too; `generate`'s argument of that name does not.
"""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from nuscenes import NuScenes
from nuscenes.utils.geometry_utils import transform_matrix
from pyquaternion import Quaternion
from torch import nn

import finetune
import train
from tests import scripts
from tests.test_rays import make_batch, seeded_generators
from unipad import config, convert
from unipad.batch import CAMERAS
from unipad.config import Augment, Data, DetectRecipe, Paste, PretrainRecipe
from unipad.config_dict import from_dict
from unipad.data import synthetic
from unipad.data.city import rig
from unipad.data.city.raycast import cast
from unipad.data.city.records import SCENES
from unipad.data.city.traffic import Scene
from unipad.data.collate import collate
from unipad.data.cutpaste import cut_out, load_objects, visible_rectangles
from unipad.data.dataset import DataError, Sample
from unipad.data.loader import step_batches
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.transforms import HIDDEN_COLOR
from unipad.draw.views import rendered_views
from unipad.errors import UserError
from unipad.evaluate.rendering import PIXEL_STRIDE, RAYS_PER_VIEW, evaluate_rendering
from unipad.model.detect import Detector
from unipad.model.encoder import Encoder
from unipad.model.pretrain import Pretrain
from unipad.model.volume import FrameFusion
from unipad.names import to_original
from unipad.recipes import DETECT, PRETRAIN

VERSION, SIZE, KEYFRAMES = "v1.0-mini", (64, 96), 3
THREE = Data(camera_sweeps=3)  # the keyframe and two sweeps
TINY_CAMERA = config.CameraConfig(
    depths=(1, 1, 1, 1), widths=(4, 8, 16, 32), channels=8, drop_path=0.0, frozen_stages=0, depth_bins=16
)
GRID = config.Grid(low=(-54.0, -54.0, -5.0), high=(54.0, 54.0, 3.0), cell=(5.4, 6.0, 1.6))


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A synthetic dataset with two camera sweeps between keyframes (nuScenes has five) and no LiDAR sweeps."""
    root = tmp_path_factory.mktemp("data") / "city"
    settings = {"scenes": 2, "keyframes": KEYFRAMES, "image_size": SIZE, "columns": 90, "sweeps": 0}
    return synthetic.generate(root, **settings, camera_sweeps=2, workers=1, progress=False)


@pytest.fixture(scope="module")
def nusc(city):
    return NuScenes(VERSION, str(city), verbose=False)


def sample_data_chain(nusc, sample, camera, count):
    """A camera's `sample_data` records of the keyframe and of the `count` frames before it, newest first; where the
    scene has fewer, its first one is repeated."""
    chain = [nusc.get("sample_data", nusc.get("sample", sample.token)["data"][camera])]
    while len(chain) <= count:
        chain.append(nusc.get("sample_data", chain[-1]["prev"]) if chain[-1]["prev"] else chain[-1])
    return chain


def sensor2global(nusc, record):
    """[4, 4] from the devkit's tables: pose of the sensor of a `sample_data` record, at its time."""
    sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
    ego = nusc.get("ego_pose", record["ego_pose_token"])
    steps = (transform_matrix(r["translation"], Quaternion(r["rotation"])) for r in (ego, sensor))
    return next(steps) @ next(steps)


def test_a_sweep_later_than_its_next_one_is_refused(city, tmp_path):
    root = shutil.copytree(city, tmp_path / "city")
    table = root / VERSION / "sample_data.json"
    rows = json.loads(table.read_text())
    sweep = next(row for row in rows if "sweeps/CAM_FRONT/" in row["filename"])
    sweep["timestamp"] += 10_000_000
    table.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="sample_data.json, row .*: its timestamp is -10 s after that of its prev"):
        for split in ("mini_train", "mini_val"):  # whichever the sweep is in
            NuScenesDataset(root, VERSION, split, THREE)


def test_sample_data_of_cameras_are_linked_as_in_nuscenes(nusc, city):
    """`next` leads through keyframes and sweeps. Sweeps precede a keyframe at 12 Hz and have its sample token."""
    for scene in nusc.scene:
        samples = [nusc.get("sample", scene["first_sample_token"])]
        while samples[-1]["next"]:
            samples.append(nusc.get("sample", samples[-1]["next"]))
        for camera in CAMERAS:
            frames = [nusc.get("sample_data", samples[0]["data"][camera])]
            while frames[-1]["next"]:
                frames.append(nusc.get("sample_data", frames[-1]["next"]))
                assert frames[-1]["prev"] == frames[-2]["token"]
            assert [f["is_key_frame"] for f in frames] == [True] + [False, False, True] * (KEYFRAMES - 1)
            # two sweeps and their keyframe each; the first keyframe has no sweeps
            owners = [s["token"] for s in samples for _ in range(3)][2:]
            assert [f["sample_token"] for f in frames] == owners
            microseconds = np.diff([f["timestamp"] for f in frames])
            assert microseconds.tolist() == [333_334, 83_333, 83_333] * (KEYFRAMES - 1)
            for f in frames:
                assert f["filename"].startswith("samples/" if f["is_key_frame"] else "sweeps/")
                assert (city / f["filename"]).is_file()
    # 2 scenes, 2 sweeps before each keyframe but the first
    assert {len(list((city / "sweeps" / camera).iterdir())) for camera in CAMERAS} == {2 * 2 * (KEYFRAMES - 1)}


def test_files_poses_and_times_of_sweeps_match_the_devkit(nusc, city):
    """Also at the start of a scene, where the first frame is repeated."""
    dataset = NuScenesDataset(city, VERSION, "mini_val", Data(camera_sweeps=6))
    for i in range(KEYFRAMES):
        sample, sweeps = dataset[i], dataset.camera_sweep_index
        lidar = nusc.get("sample_data", nusc.get("sample", sample.token)["data"]["LIDAR_TOP"])
        for n, camera in enumerate(CAMERAS):
            chain = sample_data_chain(nusc, sample, camera, 5)
            assert [r["filename"] for r in chain[1:]] == [f.decode() for f in sweeps.image_files[i, :, n]]
            for frame, record in enumerate(chain):
                to_camera = np.linalg.inv(sensor2global(nusc, record)) @ sensor2global(nusc, lidar)
                intrinsic = np.eye(4)
                sensor = nusc.get("calibrated_sensor", record["calibrated_sensor_token"])
                intrinsic[:3, :3] = sensor["camera_intrinsic"]
                view = 6 * frame + n  # of 6 cameras
                np.testing.assert_allclose(sample.lidar2camera[view], to_camera, atol=1e-5)
                np.testing.assert_allclose(sample.lidar2image[view], intrinsic @ to_camera, atol=1e-2, rtol=1e-5)
        chain = sample_data_chain(nusc, sample, "CAM_FRONT", 5)
        lags = [1e-6 * (chain[0]["timestamp"] - record["timestamp"]) for record in chain]
        np.testing.assert_allclose(sample.frame_lags, lags, atol=1e-6)
    # a row per keyframe: frames back from it; at the start of a scene the first frame is repeated
    assert sweeps.numbers.tolist() == [[0] * 5, [1, 2, 3, 3, 3], [1, 2, 3, 4, 5]]
    # with `camera_rate`, lags are nominal instead of measured
    nominal = NuScenesDataset(city, VERSION, "mini_val", replace(THREE, camera_rate=12.0))[1]
    np.testing.assert_allclose(nominal.frame_lags, [0, 1 / 12, 2 / 12], atol=1e-7)


def test_static_points_project_onto_their_pixels_in_every_frame(city):
    """LiDAR points of the keyframe have the depths that ray casting finds in the pixels of every frame."""
    sample = NuScenesDataset(city, VERSION, "mini_val", THREE)[2]
    # the only scene of mini_val, as it was generated
    scene = Scene(seed=0, index=SCENES.index("scene-0103"), duration=(KEYFRAMES - 1) * 0.5)
    # Walls and trees (classes 15, 16): the depth of the ground at a pixel hardly differs between frames, so it would
    # hide an error
    points = sample.points[sample.point_labels >= 15, :3]
    points = np.c_[points, np.ones(len(points))]
    for frame, lag in enumerate(sample.frame_lags):
        own, keyframes = [], []  # relative depth errors with the projection of the frame itself, and of the keyframe
        for n, camera in enumerate(CAMERAS):
            t = 1.0 - rig.CAMERAS[camera].early - lag  # keyframe 2 is at 1 s; each camera fires `early` seconds before
            view, solids = rig.camera_view(scene, camera, SIZE, t), scene.solids(t)
            distance, _ = cast(view, solids)
            depth = (distance * view.cosine).reshape(SIZE)
            for errors, row in ((own, 6 * frame + n), (keyframes, n)):
                u, v, d, _ = sample.lidar2image[row] @ points.T
                visible = (d > 1) & (d < 50) & (u > 0) & (u < SIZE[1] * d) & (v > 0) & (v < SIZE[0] * d)
                u, v, d = u[visible], v[visible], d[visible]
                errors.append(np.abs(depth[(v / d).astype(int), (u / d).astype(int)] / d - 1))
        own, keyframes = np.concatenate(own), np.concatenate(keyframes)
        assert len(own) > 200 and np.median(own) < 0.005
        assert frame == 0 or np.median(keyframes) > 0.01  # the ego vehicle has moved


def test_the_keyframe_is_the_same_with_and_without_sweeps(city):
    datasets = [NuScenesDataset(city, VERSION, "mini_train", data) for data in (Data(), THREE)]
    one, three = (collate([dataset[1], dataset[2]]) for dataset in datasets)
    assert one.frame_lags is None and one.frames == 1 and three.frames == 3
    assert three.images.shape == (2, 18, 3, 64, 96)  # 18 views: 3 frames of 6 cameras
    assert three.lidar2image.shape == (2, 18, 4, 4)
    assert three.image_sizes.shape == (2, 18, 2) and three.frame_lags.shape == (2, 3)
    assert three.frame_lags.dtype == torch.float32 and (three.frame_lags.diff() > 0).all()
    key = three.keyframe()
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(key, name)) if torch.is_tensor(value) else value == getattr(key, name), name
    assert key.images.data_ptr() == three.images.data_ptr()  # not a copy
    # without sweeps, `keyframe` changes nothing
    assert all(torch.equal(t, getattr(one.keyframe(), n)) for n, t in vars(one).items() if torch.is_tensor(t))


def test_all_frames_are_augmented_together(city):
    """Points keep their pixels in every view; all views share one GridMask; a stream started at the second micro-batch
    has the augmentation of the whole stream."""
    dataset = NuScenesDataset(city, VERSION, "mini_train", THREE)
    plain = dataset[1]
    vary = Augment(rotation=0.4, scale=(0.9, 1.1), translation=(0.5,) * 3, flip_x=1.0, grid_mask=1.0)
    varied = NuScenesDataset(city, VERSION, "mini_train", THREE, augment=vary)
    moved = varied.read(1, np.random.default_rng(0))
    assert len(moved.images) == 18 and not np.array_equal(moved.lidar2camera, plain.lidar2camera)
    old, new = (s.lidar2image.astype(float) @ np.c_[s.points[:, :3], np.ones(len(s.points))].T for s in (plain, moved))
    np.testing.assert_allclose(old, new, atol=2e-2)
    hidden = np.any(np.array(plain.images) != moved.images, axis=(0, 3))
    assert 0.1 < hidden.mean() < 0.9 and (np.array(moved.images)[:, hidden] == HIDDEN_COLOR).all()
    streams = (step_batches(varied, 1, start=start) for start in (0, 1))
    whole, resumed = next(streams), next(streams)
    next(whole)
    (a, _), (b, _) = next(whole), next(resumed)
    assert torch.equal(a.images, b.images) and torch.equal(a.lidar2image, b.lidar2image)


def test_crops_of_moving_objects_are_taken_where_they_were_in_each_frame():
    """A camera at rest looks along +y; a box 10 m ahead of it has moved 2 m to the right since the earlier frame."""
    lidar2image = np.array([[60.0, 32, 0, 0], [0, 32, -60, 0], [0, 1, 0, 0], [0, 0, 0, 1]], np.float32)
    images = [np.zeros((64, 64, 3), np.uint8) for _ in range(2)]
    images[0][:, 34:41] = 200  # now: 32 + 60 * 0.5 / 10.5 to 32 + 60 * 1.5 / 9.5
    images[1][:, 22:29] = 100  # then: 32 - 60 * 1.5 / 9.5 to 32 - 60 * 0.5 / 10.5
    box = np.array([[1.0, 10, 0, 1, 1, 1, 0, 4, 0]], np.float32)
    sample = Sample(
        images=images,
        lidar2image=np.stack([lidar2image] * 2),
        lidar2camera=np.stack([np.eye(4, dtype=np.float32)] * 2),  # not used
        points=np.array([[1.0, 10, 0, 0, 0]], np.float32),
        point_labels=None,
        boxes=box,
        labels=np.zeros(1, np.int64),
        token="",
        frame_lags=np.array([0, 0.5], np.float32),
    )
    (cut,) = cut_out(sample, min_points=1)
    assert [view for view, _ in cut.pictures] == [0, 1]
    means = [cv2.imdecode(jpeg, cv2.IMREAD_COLOR).mean() for _, jpeg in cut.pictures]
    np.testing.assert_allclose(means, [200, 100], atol=2)


def test_objects_are_pasted_into_all_frames(city):
    """In each frame, pixels change only where a pasted box was at the time of the image."""
    dataset = NuScenesDataset(city, VERSION, "mini_train", THREE)
    objects = load_objects(dataset, Paste(counts=(8,) * 10, min_points=1))
    plain = dataset[2]
    pasted = dataset.with_objects(objects).read(2, np.random.default_rng(0))
    new = pasted.boxes[len(plain.boxes) :]
    assert (np.abs(new[:, 7:]).max(axis=1) > 1).any()  # m/s: some of the pasted objects move
    changed = 0  # number of views of earlier frames that differ
    for view, (before, after) in enumerate(zip(plain.images, pasted.images, strict=True)):
        lag = plain.frame_lags[view // 6]
        then = np.c_[new[:, :2] - lag * new[:, 7:], new[:, 2:]]
        covered = np.zeros(SIZE, bool)
        _, rectangles = visible_rectangles(then, plain.lidar2image[view], SIZE)
        for left, top, right, bottom in rectangles:
            covered[top:bottom, left:right] = True
        difference = (before != after).any(-1)
        assert not (difference & ~covered).any()
        changed += difference.any() and lag > 0
    assert changed >= 4


def test_frame_fusion_is_that_of_uvtr():
    """Append the lag as a channel, 1 x 1 x 1 conv, norm, ReLU; concatenate all frames, 1 x 1 x 1 conv, norm, ReLU."""
    fusion = FrameFusion(channels=5, frames=3).double()
    for norm in (fusion.time_conv[1], fusion.trans_conv[1]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    volumes = torch.randn(2 * 3, 5, 2, 4, 3, dtype=torch.float64, requires_grad=True)  # 2 samples of 3 frames
    lags = torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.0, 0.5]], dtype=torch.float64)
    plane = lags.view(6, 1, 1, 1, 1).expand(-1, 1, 2, 4, 3)
    truth = fusion.trans_conv(fusion.time_conv(torch.cat([volumes, plane], 1)).view(2, 15, 2, 4, 3))
    d_out = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, [volumes, *fusion.parameters()], d_out)
    fused = fusion(volumes, lags)
    assert fused.is_contiguous(memory_format=torch.channels_last_3d)
    gradients = torch.autograd.grad(fused, [volumes, *fusion.parameters()], d_out)
    for a, b in zip((fused, *gradients), (truth, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def with_earlier_frames(batch, frames, shift=0.5):
    """A batch of several frames of two cameras: the keyframe's images repeated, each frame taken from
    `shift` meters further behind."""
    moved = [batch.lidar2camera.clone() for _ in range(frames)]
    for frame, matrix in enumerate(moved):
        matrix[:, :, 2, 3] += shift * frame * torch.tensor([1.0, -1.0])  # depths ahead grow, behind shrink
    intrinsics = batch.lidar2image @ batch.lidar2camera.inverse()
    repeat = {name: torch.cat([getattr(batch, name)] * frames, 1) for name in ("images", "image_sizes")}
    return replace(
        batch,
        **repeat,
        lidar2camera=torch.cat(moved, 1),
        lidar2image=torch.cat([intrinsics @ m for m in moved], 1),
        frame_lags=0.1 * torch.arange(frames).float().expand(len(batch), -1),
    )


@pytest.mark.parametrize("transform", ["gather", "pool"])
def test_each_frame_is_lifted_separately_and_changes_the_volume(transform):
    # "gather" is the default; "pool" reads one FPN level
    settings = {"fpn_levels": 1, "fpn_start": 3, "view": "pool"} if transform == "pool" else {}
    camera = replace(TINY_CAMERA, **settings)
    encoder = Encoder(config.Recipe(grid=GRID, data=THREE, camera=camera)).eval()
    # 2 samples without points, of 3 frames of 2 views
    batch = with_earlier_frames(make_batch([[], []], size=(64, 96), unpadded=(60, 90)), 3)
    lifted = {}
    encoder.frame_fusion.register_forward_hook(lambda module, args, out: lifted.update(volumes=args[0]))
    encoded = encoder.encode(batch, None)
    assert encoded.volume.shape == (2, 8, 5, 18, 20) and encoded.depths[0].shape[:2] == (2, 6)
    # the same weights for one frame, without frame fusion
    alone = Encoder(config.Recipe(grid=GRID, camera=camera)).eval()
    assert alone.load_state_dict(encoder.state_dict(), strict=False).missing_keys == []
    for index in range(3):  # of the frame
        views = slice(2 * index, 2 * index + 2)
        names = ("images", "image_sizes", "lidar2image", "lidar2camera")
        frame = replace(batch, **{n: getattr(batch, n)[:, views] for n in names}, frame_lags=None)
        torch.testing.assert_close(lifted["volumes"].unflatten(0, (2, 3))[:, index], alone(frame, None)[0])

    def changed(**fields):
        """The largest change of each sample's volume if `fields` of the batch are replaced."""
        return (encoder(replace(batch, **fields), None)[0] - encoded.volume).abs().amax((1, 2, 3, 4))

    other = batch.images.clone()
    other[0, 4:] = 1 - other[0, 4:]  # the oldest frame of the first sample
    in_first, in_second = changed(images=other)
    assert in_first > 1e-3 * encoded.volume.abs().max() and in_second == 0
    assert changed(frame_lags=3 * batch.frame_lags).min() > 0
    with pytest.raises(AssertionError, match="1 frames of images, the recipe 3"):
        encoder(batch.keyframe(), None)


def test_every_weight_of_the_frame_fusion_gets_a_gradient_and_encoding_is_reproducible():
    encoder = Encoder(config.Recipe(grid=GRID, data=THREE, camera=TINY_CAMERA))
    batch = with_earlier_frames(make_batch([[], []], size=(64, 96), unpadded=(60, 90)), 3)
    encoded = encoder.encode(batch, seeded_generators(0, 1))
    masks = encoded.masks["camera"]
    assert masks.shape == (2, 6, 2, 3)
    assert not torch.equal(masks[:, :2], masks[:, 2:4])  # of the keyframe, of the frame before it
    encoded.volume.square().sum().backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in encoder.frame_fusion.parameters())
    assert torch.equal(encoder.encode(batch, seeded_generators(0, 1)).volume, encoded.volume)


def test_rays_are_cast_from_the_keyframe_only(city):
    """Twelve views are encoded; rays are cast from six, in training, evaluation and pictures."""
    recipe = PRETRAIN["camera"]["tiny"]
    recipe = replace(recipe, data=replace(recipe.data, camera_sweeps=2, image_size=SIZE))
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=8, lidar_per_view=8))
    dataset = NuScenesDataset(city, VERSION, "mini_val", recipe.data)
    net, batch = Pretrain(recipe), collate([dataset[1]]).to("cpu")
    rays = []
    net.renderer.register_forward_hook(lambda module, args, out: rays.append(args[1]))
    losses, _ = net(batch, seeded_generators(0))
    sum(losses.values()).backward()
    assert len(rays[0]) == 6 * 8 and net.encoder.frame_fusion.trans_conv[0].weight.grad.any()
    metrics = evaluate_rendering(net, [(0, batch)], seed=0, device=torch.device("cpu"))
    assert metrics["psnr"] > 0 and metrics["depth_abs_rel"] > 0
    ray_count = sum(len(r) for r in rays[1:])
    height, width = SIZE
    # through every PIXEL_STRIDE-th pixel along both axes, and through LiDAR points
    assert ray_count == 6 * (height // PIXEL_STRIDE) * (width // PIXEL_STRIDE) + 6 * RAYS_PER_VIEW
    # six columns of 240 pixels, one per camera, not twelve
    assert 6 * 240 < rendered_views(net, batch, seeded_generators(0), stride=32).shape[1] < 12 * 240


def test_finetuning_with_sweeps_starts_the_frame_fusion_from_scratch(city, tmp_path):
    """The pre-trained model takes one frame of images, so the frame fusion is new; both scripts read two."""
    recipe = PRETRAIN["camera"]["tiny"]
    state = {"model": Pretrain(recipe).state_dict(), "config": {}}
    torch.save(state, tmp_path / "one.pt")
    flags = ["--device", "cpu", "--workers", "0", "--steps", "1", "--data.camera-sweeps", "2", "--preset", "tiny"]
    flags += ["--data-root", str(city), "--pretrained", str(tmp_path / "one.pt"), "--out", str(tmp_path / "run")]
    both = "import sys, finetune, eval; finetune.main(finetune.parse(sys.argv[2:])); "
    both += "eval.main(eval.parse([sys.argv[1], '--device', 'cpu', '--workers', 0, '--pictures', 1]))"
    done = scripts.run("-c", both, tmp_path / "run", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "new, from scratch: encoder.frame_fusion.time_conv, encoder.frame_fusion.trans_conv" in done.stdout
    assert "detect on 3 frames of mini_val" in done.stdout  # keyframes are counted, not sweeps
    assert (tmp_path / "run" / "eval" / "boxes_0.png").is_file()


@pytest.mark.parametrize("finetuned", [False, True])
def test_checkpoints_of_several_frames_convert_both_ways(finetuned):
    """The keys are those of the original's view transform. There, a frame n back is always n / 12 s old; a model
    trained with measured lags (`camera_rate` 0) is converted with a note."""
    recipe_cls, presets, build = (DetectRecipe, DETECT, Detector) if finetuned else (PretrainRecipe, PRETRAIN, Pretrain)
    recipe = presets["camera"]["tiny"]
    net = build(replace(recipe, data=replace(recipe.data, camera_sweeps=4)))
    state, unknown = to_original(net.state_dict())
    assert not unknown
    # the original also has a norm after stage 0, which its FPN does not read
    state |= {"img_backbone.norm0.weight": torch.ones(24), "img_backbone.norm0.bias": torch.zeros(24)}
    # 32 channels and the lag; 32 channels of 4 frames
    shapes = {k: tuple(v.shape) for k, v in state.items() if "view_trans.t" in k and k.endswith("0.weight")}
    assert shapes == {
        "pts_bbox_head.view_trans.time_conv.0.weight": (32, 33, 1, 1, 1),
        "pts_bbox_head.view_trans.trans_conv.0.weight": (32, 128, 1, 1, 1),
    }
    if finetuned:
        state["pts_bbox_head.code_weights"] = torch.tensor(recipe.detect.code_weights)
    ours, report = convert.convert_unipad(state)
    assert not report.faults, report
    converted = from_dict(recipe_cls, ours["config"]["recipe"])
    assert converted.data.camera_sweeps == 4 and converted.data.camera_rate == 12.0
    build(converted).load_state_dict(ours["model"])
    back, report = convert.convert_ours(ours)
    assert not report.faults and back["state_dict"].keys() == state.keys()
    assert all(torch.equal(back["state_dict"][k], v) for k, v in state.items())
    assert not any("trained with" in line for line in report.notes)
    for rate, words in ((0.0, "measured ones"), (6.0, "n / 6.0 s")):
        ours["config"]["recipe"]["data"]["camera_rate"] = rate
        assert any(f"sweeps of {words}; the original" in line for line in convert.convert_ours(ours)[1].notes)


def test_a_camera_checkpoint_of_several_frames_is_merged_for_fusion():
    saved = {}
    for modality in ("camera", "lidar"):
        recipe = PRETRAIN[modality]["tiny"]
        frames = 3 if modality == "camera" else 1
        recipe = replace(recipe, data=replace(recipe.data, camera_sweeps=frames))
        saved[modality] = {"model": Pretrain(recipe).state_dict(), "config": {"recipe": convert.to_dict(recipe)}}
    merged, _ = convert.merge(saved["camera"], saved["lidar"])
    recipe = from_dict(PretrainRecipe, merged["config"]["recipe"])
    assert recipe.data.camera_sweeps == 3
    new = {
        name.split(".")[1] for name in Pretrain(recipe).encoder.state_dict(prefix="encoder.").keys() - merged["model"]
    }
    assert new == {"fuse"}  # what fuses the volumes of camera and LiDAR


def test_camera_sweeps_add_only_the_frame_fusion_and_need_a_camera():
    """Models of three frames of images have the frame fusion in addition, and nothing else; without a camera encoder,
    camera sweeps are refused."""
    for presets, build in ((PRETRAIN, Pretrain), (DETECT, Detector)):
        with torch.device("meta"):
            one, three = (build(presets["camera"][name]) for name in ("camera-0.075", "camera-0.075-sweeps"))
        more = dict(three.named_parameters()).keys() - dict(one.named_parameters()).keys()
        count = sum(p.numel() for p in three.parameters()) - sum(p.numel() for p in one.parameters())
        assert {name.split(".")[1] for name in more} == {"frame_fusion"}
        # two 1 x 1 x 1 convolutions, from 256 channels and the lag to 256, and from three times 256 to 256: their
        # weights, and for each a bias and a norm's weight and bias
        assert count == (257 + 3 * 256) * 256 + 2 * 3 * 256
    for script in (train, finetune):
        for modality in ("camera", "fusion"):
            args = script.parse(["--modality", modality, "--data.camera-sweeps", 5])
            assert args.recipe.data.camera_sweeps == 5
        with pytest.raises(UserError, match="--data.camera-sweeps needs a camera encoder"):
            script.parse(["--modality", "lidar", "--data.camera-sweeps", 2])
