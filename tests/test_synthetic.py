"""The synthetic dataset: the devkit reads it as nuScenes, its sensors agree, and its seed determines it."""

import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.eval.lidarseg.evaluate import LidarSegEval
from nuscenes.eval.lidarseg.utils import LidarsegClassMapper
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from nuscenes.utils.splits import create_splits_scenes
from pyquaternion import Quaternion

from unipad.config import Data
from unipad.data import synthetic
from unipad.data.city import rig
from unipad.data.city.raycast import GROUND, SKY, CameraView, LidarView, cast
from unipad.data.city.records import SCENES, scene_names
from unipad.data.city.solids import CATEGORIES, CATEGORY, SOLID, solid
from unipad.data.city.traffic import Scene
from unipad.data.nuscenes import NuScenesDataset

VERSION = "v1.0-mini"
SMALL = {"scenes": 3, "keyframes": 3, "image_size": (72, 128), "workers": 2}
# columns: azimuths of the LiDAR
TINY = {"scenes": 2, "keyframes": 2, "image_size": (32, 48), "columns": 60, "progress": False}
# "meta" of a submission
META = {"use_camera": True, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Root of a dataset with a scene of mini_train and both of mini_val: LidarSegEval requires all of a split."""
    return synthetic.generate(tmp_path_factory.mktemp("data") / "city", **SMALL, progress=False)


@pytest.fixture(scope="module")
def nusc(city):
    return NuScenes(version="v1.0-mini", dataroot=str(city), verbose=False)


@pytest.fixture(scope="module")
def scene():
    """The first 2 seconds of a drive, before its left turn."""
    return Scene(seed=0, index=1, duration=2.0)


def validation(nusc):
    """The sample records of mini_val."""
    names = create_splits_scenes()["mini_val"]
    return [s for s in nusc.sample if nusc.get("scene", s["scene_token"])["name"] in names]


def test_the_devkit_loads_and_draws_the_dataset(nusc, tmp_path):
    assert {t for t in nusc.table_names} >= {
        "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample",
        "sample_annotation", "sample_data", "scene", "sensor", "visibility", "lidarseg",
    }  # fmt: skip
    assert [len(nusc.scene), len(nusc.sample)] == [3, 9]
    # scenes * (images + LiDAR keyframes + sweeps before two of them)
    assert len(nusc.sample_data) == 3 * (6 * 3 + 3 + 2 * 9)
    assert len(nusc.lidarseg) == 9
    assert all((Path(nusc.dataroot) / d["filename"]).is_file() for d in nusc.sample_data)
    sample = nusc.sample[1]
    lidar = sample["data"]["LIDAR_TOP"]
    nusc.render_sample_data(lidar, nsweeps=3, out_path=str(tmp_path / "sweeps.png"), verbose=False)
    nusc.render_sample_data(lidar, show_lidarseg=True, out_path=str(tmp_path / "labels.png"), verbose=False)
    nusc.render_sample_data(sample["data"]["CAM_BACK"], out_path=str(tmp_path / "back.png"), verbose=False)
    nusc.render_pointcloud_in_image(sample["token"], out_path=str(tmp_path / "points.png"), verbose=False)
    for name in ("sweeps", "labels", "back", "points"):
        picture = cv2.imread(str(tmp_path / f"{name}.png"))
        assert picture.std() > 20, name  # not blank


def test_the_dataset_is_marked_as_synthetic(nusc, city):
    assert synthetic.is_synthetic(city)
    assert "Synthetic" in (city / "README.txt").read_text()
    assert all(log["vehicle"] == "synthetic" and "synthetic" in log["location"] for log in nusc.log)
    assert all("Synthetic" in scene["description"] for scene in nusc.scene)


def test_prev_next_and_timestamps_are_as_in_nuscenes(nusc):
    for scene in nusc.scene:
        first, last = nusc.get("sample", scene["first_sample_token"]), nusc.get("sample", scene["last_sample_token"])
        assert first["prev"] == last["next"] == ""
        frames = follow(nusc, "sample_data", first["data"]["LIDAR_TOP"])
        assert [f["is_key_frame"] for f in frames] == [True] + ([False] * 9 + [True]) * 2
        assert set(np.diff([f["timestamp"] for f in frames])) == {50_000}  # microseconds
        keyframe = first
        for frame in frames:  # a sweep belongs to the keyframe after it
            if frame["timestamp"] > keyframe["timestamp"]:
                keyframe = nusc.get("sample", keyframe["next"])
            assert frame["sample_token"] == keyframe["token"]
            assert not frame["is_key_frame"] or frame["timestamp"] == keyframe["timestamp"]
        for channel in rig.CAMERAS:
            frames = follow(nusc, "sample_data", first["data"][channel])
            assert len(frames) == 3
            early = [keyframe_time(nusc, f) - f["timestamp"] for f in frames]
            assert all(0 < e < 50_000 for e in early)  # microseconds: cameras fire before the LiDAR's timestamp
    for instance in nusc.instance:
        chain = follow(nusc, "sample_annotation", instance["first_annotation_token"])
        assert len(chain) == instance["nbr_annotations"]
        assert chain[-1]["token"] == instance["last_annotation_token"]


def follow(nusc, table, token):
    """The records of a table from a token on, by their `next`; asserts that each `prev` leads back."""
    records = []
    while token:
        records.append(nusc.get(table, token))
        assert records[-1]["prev"] == (records[-2]["token"] if len(records) > 1 else "")
        token = records[-1]["next"]
    return records


def keyframe_time(nusc, frame):
    """Microseconds: the timestamp of the sample that a sample_data record belongs to."""
    return nusc.get("sample", frame["sample_token"])["timestamp"]


def test_ego_and_traffic_move_at_plausible_speeds(nusc):
    for scene in nusc.scene:
        frames = follow(nusc, "sample_data", nusc.get("sample", scene["first_sample_token"])["data"]["LIDAR_TOP"])
        track = np.array([nusc.get("ego_pose", f["ego_pose_token"])["translation"] for f in frames])
        speed = np.linalg.norm(np.diff(track, axis=0), axis=1) / 0.05  # m/s: LiDAR frames are 0.05 s apart
        assert (speed > 4).all() and (speed < 10).all()
        assert (track[:, :2] > 0).all()  # the origin is the lower left corner of the map
    speeds = {}  # category -> m/s of its annotations, 0 where the devkit knows no velocity
    for annotation in nusc.sample_annotation:
        speed = np.linalg.norm(nusc.box_velocity(annotation["token"]))
        speeds.setdefault(annotation["category_name"], []).append(np.nan_to_num(speed))
    assert 2 < max(speeds["vehicle.car"]) < 12
    assert 0.5 < max(speeds["human.pedestrian.adult"]) < 2
    assert max(speeds["movable_object.trafficcone"] + speeds["vehicle.trailer"]) == 0


def test_poses_in_the_tables_are_those_of_the_rendered_views(nusc):
    for record in validation(nusc)[:2]:
        name = nusc.get("scene", record["scene_token"])["name"]
        scene = Scene(seed=0, index=SCENES.index(name), duration=(SMALL["keyframes"] - 1) * 0.5)  # keyframes at 2 Hz
        start = nusc.get("sample", nusc.get("scene", record["scene_token"])["first_sample_token"])["timestamp"]
        for channel in rig.CAMERAS:
            frame = nusc.get("sample_data", record["data"][channel])
            calibration = nusc.get("calibrated_sensor", frame["calibrated_sensor_token"])
            pose = nusc.get("ego_pose", frame["ego_pose_token"])
            ego_rotation = Quaternion(pose["rotation"])
            view = rig.camera_view(scene, channel, SMALL["image_size"], (frame["timestamp"] - start) / 1e6)
            origin = ego_rotation.rotate(np.array(calibration["translation"])) + pose["translation"]
            np.testing.assert_allclose(view.origin, origin, atol=1e-6)
            rotation = (ego_rotation * Quaternion(calibration["rotation"])).rotation_matrix
            np.testing.assert_allclose(view.rotation, rotation, atol=1e-6)
            np.testing.assert_allclose(view.intrinsic, calibration["camera_intrinsic"])


def test_points_lie_on_the_ground_and_in_their_boxes(nusc):
    for record in nusc.sample:
        token = record["data"]["LIDAR_TOP"]
        path, boxes, _ = nusc.get_sample_data(token)
        points = LidarPointCloud.from_file(path).points
        labels = np.fromfile(Path(nusc.dataroot) / nusc.get("lidarseg", token)["filename"], np.uint8)
        assert len(labels) == points.shape[1]
        assert points[3].min() >= 0 and points[3].max() <= 255  # row 3: intensity
        flat = np.isin(labels, [CATEGORY[n] for n in CATEGORIES if n.startswith("flat")])
        assert np.abs(points[2, flat] + rig.LIDAR_POSITION[2]).max() < 0.06  # meters: range noise
        in_boxes = np.zeros(len(labels), bool)
        for box in boxes:
            # 1.1: noise moves some points out of their box
            inside = points_in_box(box, points[:3], wlh_factor=1.1) & (labels == CATEGORY[box.name])
            assert inside.sum() >= nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            in_boxes |= inside
        on_actors = np.isin(labels, [CATEGORY[box.name] for box in boxes])
        assert in_boxes[on_actors].mean() > 0.99


def test_annotations_as_predictions_score_one(nusc, tmp_path):
    results = {}
    for sample in validation(nusc):
        results[sample["token"]] = [
            {
                "sample_token": sample["token"],
                **{key: annotation[key] for key in ("translation", "size", "rotation")},
                "velocity": np.nan_to_num(nusc.box_velocity(annotation["token"])[:2]).tolist(),
                "detection_name": category_to_detection_name(annotation["category_name"]),
                "detection_score": 1.0,
                "attribute_name": "".join(nusc.get("attribute", a)["name"] for a in annotation["attribute_tokens"]),
            }
            for annotation in (nusc.get("sample_annotation", token) for token in sample["anns"])
            if annotation["num_lidar_pts"]  # as in the devkit's ground truth
        ]
    path = tmp_path / "results_nusc.json"
    path.write_text(json.dumps({"meta": META, "results": results}))
    config = config_factory("detection_cvpr_2019")
    evaluation = DetectionEval(nusc, config, str(path), "mini_val", str(tmp_path), verbose=False)
    metrics = evaluation.main(plot_examples=0, render_curves=False)
    assert metrics["nd_score"] == pytest.approx(1.0, abs=1e-4)
    assert min(metrics["mean_dist_aps"].values()) == pytest.approx(1.0, abs=1e-4)


def test_labels_as_predictions_score_one_on_all_classes(nusc, tmp_path):
    mapper = LidarsegClassMapper(nusc)
    folder = tmp_path / "lidarseg" / "mini_val"
    folder.mkdir(parents=True)
    (tmp_path / "mini_val").mkdir()
    (tmp_path / "mini_val" / "submission.json").write_text(json.dumps({"meta": META}))
    classes = set()
    for sample in validation(nusc):
        record = nusc.get("lidarseg", sample["data"]["LIDAR_TOP"])
        truth = mapper.convert_label(np.fromfile(Path(nusc.dataroot) / record["filename"], np.uint8))
        classes |= set(truth.tolist())
        # a submission must not contain 0
        np.maximum(truth, 1).astype(np.uint8).tofile(folder / f"{record['sample_data_token']}_lidarseg.bin")
    assert classes == set(range(17))  # 0, to be ignored, is the ego vehicle
    assert LidarSegEval(nusc, str(tmp_path), "mini_val").evaluate()["miou"] == pytest.approx(1.0)


def test_lidar_and_cameras_agree(scene):
    """At one instant, LiDAR points project to pixels of their depth, unless they are occluded from the camera."""
    t, size = 1.0, (450, 800)
    scan = rig.scan(scene, t, columns=360, rng=np.random.default_rng(0))
    # the cameras do not see the ego vehicle
    points = scan.points[scan.category != CATEGORY["vehicle.ego"], :3].astype(np.float64)
    rotation, translation = rig.ego_pose(scene, t)
    points = points @ (rotation * rig.LIDAR_ROTATION).rotation_matrix.T
    points += rotation.rotate(np.array(rig.LIDAR_POSITION)) + translation
    compared = 0
    for channel in rig.CAMERAS:
        view = rig.camera_view(scene, channel, size, t)
        distance, _ = cast(view, scene.solids(t))
        depth = (distance * view.cosine).reshape(size)
        x, y, z = ((points - view.origin) @ view.rotation).T
        focal, u0, v0 = view.intrinsic[0, 0], *view.intrinsic[:2, 2]
        u, v = (np.floor(c).astype(int) for c in (focal * x / z + u0, view.intrinsic[1, 1] * y / z + v0))
        in_image = (z > 1) & (u > 0) & (u < size[1] - 1) & (v > 0) & (v < size[0] - 1)
        u, v, z = u[in_image], v[in_image], z[in_image]
        around = np.stack([depth[v + dv, u + du] for dv in (-1, 0, 1) for du in (-1, 0, 1)])
        slack = 0.1 + 0.01 * z  # meters: range noise, and half a pixel on slanted surfaces
        assert (z < around.max(axis=0) + slack).mean() > 0.9, channel  # the rest is hidden from the camera
        # almost no point is in front of the surface that the camera sees
        assert (z > around.min(axis=0) - slack).mean() > 0.999, channel
        compared += len(z)
    assert compared > 3000


def test_cast_returns_distances_computed_by_hand():
    # center of the bottom, yaw, (length, width, height), material, color, category; the wedge's front leans inwards by
    # 1 m per meter of height
    box = solid((10, 0, 0), 0.0, (2, 2, 2), "plain", (1, 1, 1), "static.manmade")
    ball = solid((0, 10, 0), 0.0, (2, 4, 2), "plain", (1, 1, 1), "static.vegetation", is_round=True)
    wedge = solid((-10, 0, 0), 0.0, (4, 4, 2), "plain", (1, 1, 1), "static.manmade", taper=(1, 0, 0))
    solids = np.array([box, ball, wedge], dtype=SOLID)
    view = LidarView(np.array([0.0, 0, 1]), yaw=0.0, elevations=np.radians([-45.0, 0, 45]), columns=4)
    distance, hit = (a.reshape(view.shape) for a in cast(view, solids))
    # horizontal rays towards +x, +y, -x, -y hit: face of the box, nearest point of the ball, face of the wedge, nothing
    np.testing.assert_allclose(distance[1, :3], [9, 8, 9], atol=1e-5)
    assert hit[1].tolist() == [0, 1, 2, SKY]
    # rays 45 degrees down hit the ground 1 m below; those 45 degrees up hit nothing
    np.testing.assert_allclose(distance[0], 2**0.5, atol=1e-5)
    assert (hit[0] == GROUND).all() and (hit[2] == SKY).all()


@pytest.mark.parametrize("kind", ["camera", "lidar"])
def test_ray_windows_miss_no_hit(scene, kind, monkeypatch):
    """The rays of a solid's window, the rectangle of rays that may hit it, give the same result as all rays."""
    solids = scene.solids(0.5)
    if kind == "camera":
        view = rig.camera_view(scene, "CAM_FRONT_LEFT", size=(40, 64), t=0.5)
    else:
        view = rig.lidar_view(scene, columns=90, t=0.5)
    with_windows = cast(view, solids)
    n, (rows, columns) = len(solids), view.shape
    # as `windows` returns them: solid, row begin and end, column begin and end
    all_rays = np.arange(n), np.zeros(n, int), np.full(n, rows), np.zeros(n, int), np.full(n, columns)
    monkeypatch.setattr(CameraView if kind == "camera" else LidarView, "windows", lambda self, solids: all_rays)
    for windowed, full in zip(with_windows, cast(view, solids), strict=True):
        np.testing.assert_array_equal(windowed, full)


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory):
    """Root of a tiny dataset generated by one process."""
    return synthetic.generate(tmp_path_factory.mktemp("data") / "one_worker", workers=1, **TINY)


def test_contents_depend_on_the_seed_but_not_on_workers(one_worker, tmp_path):
    two_workers = synthetic.generate(tmp_path / "two_workers", workers=2, **TINY)
    other_seed = synthetic.generate(tmp_path / "other_seed", workers=1, seed=1, **TINY)
    assert contents(one_worker) == contents(two_workers)
    seed_0, seed_1 = contents(one_worker), contents(other_seed)
    images = [name for name in seed_0 if name.endswith(".jpg")]
    assert images and all(seed_0[name] != seed_1[name] for name in images)


def test_a_killed_worker_loses_nothing(one_worker, tmp_path, capfd):
    root, done = tmp_path / "set", threading.Event()

    def kill_workers():
        # wait for the first image, or for the end of `generate`
        while not (list(tmp_path.glob(".set.partial-*/samples/*/*.jpg")) or done.wait(0.01)):
            pass
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        synthetic.generate(root, workers=2, **TINY)
    finally:
        done.set()
        killer.join()
    assert "one of 2 processes died: going on with 1" in capfd.readouterr().err
    assert contents(root) == contents(one_worker)


def contents(root):
    """{path below root: bytes} of all files."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_failure_leaves_the_old_dataset_in_place(tmp_path, monkeypatch):
    """Whether tables cannot be made, or the complete new dataset cannot be renamed to the place of the old one."""
    root = synthetic.generate(tmp_path / "set", workers=1, **TINY)
    before = contents(root)
    monkeypatch.setattr(synthetic, "make_tables", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synthetic.generate(root, workers=1, seed=1, **TINY)
    assert contents(root) == before
    assert list(tmp_path.iterdir()) == [root]
    monkeypatch.undo()

    rename = Path.rename

    def fails_for_the_new_dataset(path, target):
        if ".partial-" in path.name:
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_dataset)
    with pytest.raises(OSError, match="no"):
        synthetic.generate(root, workers=1, seed=1, **TINY)
    assert contents(root) == before and list(tmp_path.iterdir()) == [root]
    monkeypatch.undo()
    synthetic.generate(root, workers=1, seed=1, **TINY)
    assert contents(root) != before
    assert list(tmp_path.iterdir()) == [root]


def test_any_number_of_scenes_has_both_splits():
    splits = create_splits_scenes()
    assert scene_names(settings(scenes=10)) == sorted(splits["mini_train"] + splits["mini_val"])
    for count in range(2, 10):
        names = scene_names(settings(scenes=count))
        assert len(names) == count
        assert set(names) & set(splits["mini_train"]) and set(names) & set(splits["mini_val"])


def settings(**others):
    return synthetic.Args(out=Path("unused"), **others)


def test_a_city_of_many_scenes_has_splits_of_its_own(tmp_path):
    root = synthetic.generate(tmp_path / "set", **TINY | {"scenes": 12})
    assert synthetic.is_synthetic(root)
    nusc = NuScenes(version="city", dataroot=str(root), verbose=False)
    assert [scene["name"] for scene in nusc.scene] == [f"city-{n:04d}" for n in range(12)]
    assert len({nusc.get("map", m["token"])["filename"] for m in nusc.map}) == 1  # 12 scenes fit into one district
    splits = json.loads((root / "city" / "splits.json").read_text())
    assert [len(splits[name]) for name in ("city_train", "city_dev", "city_val")] == [8, 2, 2]
    assert sorted(sum(splits.values(), [])) == [scene["name"] for scene in nusc.scene]
    assert NuScenesDataset.splits(root, "city")["val"] == "city_val"
    assert len(NuScenesDataset(root, "city", "city_dev", Data())) == 2 * TINY["keyframes"]


def test_many_scenes_are_in_several_districts_and_in_varied_weather():
    scenes = [Scene(seed=0, index=index, duration=0.5, varied=True) for index in (0, 15, 16)]
    assert scenes[0].city is scenes[1].city and scenes[1].city is not scenes[2].city
    # the blocks at the same place of two districts differ
    blocks = [city.block(3, 3) for city in (scenes[0].city, scenes[2].city)]
    assert len(blocks[0]) != len(blocks[1]) or not np.array_equal(*blocks)
    assert len({scene.weather.haze_length for scene in scenes}) == 3
    assert {scene.weather.clouds > 0 for scene in scenes} == {False, True}
    # the default city keeps its sunny days
    sunny = [Scene(seed=0, index=index, duration=0.5).weather for index in (0, 1)]
    assert {(w.sunlight, w.skylight, w.clouds, w.haze_length) for w in sunny} == {(0.75, 0.42, 0.0, 320.0)}


@pytest.mark.parametrize(
    "setting",
    [{"scenes": 1}, {"scenes": 1001}, {"keyframes": 1}, {"image_size": (8, 8)}, {"workers": 0}, {"camera_sweeps": 6}],
)
def test_invalid_settings_are_rejected(tmp_path, setting):
    with pytest.raises(synthetic.SettingError, match=next(iter(setting)).replace("_", "-")):
        synthetic.generate(tmp_path / "set", **setting)
    assert not (tmp_path / "set").exists()


def test_command_line_does_not_touch_other_folders(tmp_path):
    (tmp_path / "thesis.tex").touch()
    command = [sys.executable, "-m", "unipad.data.synthetic", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and str(tmp_path) in run.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


@pytest.mark.parametrize("content", [b"", b"[]", b"[3]", b"{}", b"[{}]", b'[{"vehicle": []}]', b"\xff", b"[" * 10**5])
def test_a_folder_with_a_damaged_log_table_is_not_replaced(tmp_path, content):
    (tmp_path / VERSION).mkdir()
    (tmp_path / VERSION / "log.json").write_bytes(content)
    assert not synthetic.is_synthetic(tmp_path)
    with pytest.raises(synthetic.SettingError, match="contains something that is not a synthetic dataset"):
        synthetic.generate(tmp_path)
