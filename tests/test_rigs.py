"""Rigs with any number of cameras, names, image sizes and file formats: read, trained on, evaluated and drawn."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

import finetune
import train
from tests import scripts
from tests.test_finetune import SMALL as FINETUNE_FLAGS
from tests.test_rays import seeded_generators
from tests.test_train import SMALL as TRAIN_FLAGS
from tests.test_train import curve
from unipad.config import Augment, Data, Paste
from unipad.data.collate import collate
from unipad.data.cutpaste import load_objects
from unipad.data.dataset import DataError
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw.boxes import camera_rows, detection_views
from unipad.draw.segments import segment_views
from unipad.draw.views import rendered_views
from unipad.model.detect import Detections
from unipad.model.pretrain import Pretrain
from unipad.model.rays import pixel_rays
from unipad.recipes import PRETRAIN
from unipad.runtime import World

VERSION = "v1.0-mini"
# number of cameras -> {name: (camera of the synthetic dataset that is copied, (height, width), ending of its files)}
RIGS = {
    1: {"front": ("CAM_FRONT", (72, 128), ".png")},
    5: {
        "CAM_BACK": ("CAM_BACK", (36, 64), ".jpg"),
        "CAM_FRONT": ("CAM_FRONT", (72, 128), ".jpg"),
        "cam_left": ("CAM_FRONT_LEFT", (90, 160), ".png"),
        "cam_right": ("CAM_FRONT_RIGHT", (90, 160), ".bmp"),
        "Überkopf": ("CAM_FRONT", (108, 192), ".jpg"),
    },
    8: {f"cam{i}": ("CAM_FRONT", (32 + 2 * i, 64 + 4 * i), (".jpg", ".png")[i % 2]) for i in range(8)},
}
# Table -> its fields with tokens of one camera: made distinct when a camera is copied
TOKENS_OF_CAMERA = {
    "sensor": ["token"],
    "calibrated_sensor": ["token", "sensor_token"],
    "sample_data": ["token", "prev", "next", "calibrated_sensor_token"],
}


def read(root, name):
    """The rows of a nuScenes table."""
    return json.loads((root / VERSION / f"{name}.json").read_text())


def write(root, name, rows):
    (root / VERSION / f"{name}.json").write_text(json.dumps(rows))


def set_rig(root, rig):
    """Replace the cameras of a synthetic dataset, in its tables and files. rig: as in `RIGS`.

    Every row gets a field `channel`, the name of its sensor, which only sensor.json has in nuScenes.
    """
    tables = {name: read(root, name) for name in TOKENS_OF_CAMERA}
    channel_of_sensor = {row["token"]: row["channel"] for row in tables["sensor"]}
    for row in tables["calibrated_sensor"]:
        row["channel"] = channel_of_sensor[row["sensor_token"]]
    channel_of_calibration = {row["token"]: row["channel"] for row in tables["calibrated_sensor"]}
    for row in tables["sample_data"]:
        row["channel"] = channel_of_calibration[row["calibrated_sensor_token"]]
    new = {name: [row for row in rows if row["channel"] == "LIDAR_TOP"] for name, rows in tables.items()}
    for camera, (source, size, ending) in rig.items():
        for table, fields in TOKENS_OF_CAMERA.items():
            for row in (row for row in tables[table] if row["channel"] == source):
                tokens = {field: row[field] and f"{row[field]}-{camera}" for field in fields}  # "" stays
                row = row | tokens | {"channel": camera}
                new[table].append(row)
                if table == "calibrated_sensor":
                    row["camera_intrinsic"] = [  # from the 72 x 128 of `city` to `size`
                        [value * scale for value in line]
                        for line, scale in zip(row["camera_intrinsic"], (size[1] / 128, size[0] / 72, 1), strict=True)
                    ]
                if table == "sample_data":
                    old, file = root / row["filename"], f"samples/{camera}/{row['token']}{ending}"
                    row |= {"filename": file, "height": size[0], "width": size[1]}
                    (root / file).parent.mkdir(exist_ok=True)
                    cv2.imencode(ending, cv2.resize(cv2.imread(str(old)), size[::-1]))[1].tofile(root / file)
    for name, rows in new.items():
        write(root, name, rows)


@pytest.fixture(params=RIGS)
def rig(request, city_copy):
    """(root of a dataset, its cameras as in `RIGS`)"""
    set_rig(city_copy, RIGS[request.param])
    return city_copy, RIGS[request.param]


def test_a_rig_is_read_as_its_tables_say(rig, city):
    """Names, order, sizes, mean colors and projections of the cameras; detections and segments can be drawn."""
    root, cameras = rig
    original = NuScenesDataset(city, VERSION, "mini_val", Data())[1]
    dataset = NuScenesDataset(root, VERSION, "mini_val", Data())
    sample = dataset[1]
    if len(cameras) == 5:
        assert sample.cameras == ("CAM_FRONT", "CAM_BACK", "cam_left", "cam_right", "Überkopf")  # nuScenes names first
    assert set(sample.cameras) == set(cameras) and len(sample.images) == len(cameras)
    for view, name in enumerate(sample.cameras):
        source, (h, w), _ = cameras[name]
        source_view = original.cameras.index(source)
        assert sample.images[view].shape == (h, w, 3)
        np.testing.assert_allclose(sample.images[view].mean((0, 1)), original.images[source_view].mean((0, 1)), atol=4)
        scaled = np.diag([w / 128, h / 72, 1, 1]) @ original.lidar2image[source_view]
        np.testing.assert_allclose(sample.lidar2image[view], scaled, rtol=1e-5, atol=1e-3)

    batch = collate([dataset[0], sample]).to("cpu")
    H, W = (max(size[i] for _, size, _ in cameras.values()) for i in range(2))
    assert batch.images.shape[-2:] == (-(-H // 32) * 32, -(-W // 32) * 32)  # padded to multiples of 32
    assert sorted(view for row in camera_rows(batch) for view in row) == list(range(len(cameras)))
    detected = Detections(batch.boxes[:1], torch.ones(1), batch.labels[:1])
    # cameras, each 520 pixels wide with boxes and 300 with classes, are drawn in two rows beside a bird's-eye view
    columns = -(-len(cameras) // 2)
    assert detection_views(batch, detected).shape[1] > 520 * columns
    keyframe_points = (batch.points[: batch.point_counts[0], 4] == 0).sum()  # column 4: time lag
    assert segment_views(batch, torch.ones(keyframe_points, dtype=torch.uint8)).shape[1] > 300 * columns
    rays = pixel_rays(batch, sample=0, stride=8)
    assert len(rays) == sum(-(-h // 8) * -(-w // 8) for _, (h, w), _ in cameras.values())
    assert (rays.rgb.sum(dim=1) > 0).all()  # none in the padding


@pytest.mark.parametrize("rig", [5], indirect=True)
def test_training_with_augmentation_and_pasting_on_a_mixed_rig(rig):
    """Gradients of a step are finite, and the rendered views of all five cameras can be drawn."""
    root, _ = rig
    recipe = PRETRAIN["fusion"]["tiny"]
    recipe = replace(recipe, rays=replace(recipe.rays, per_view=8))
    augment = Augment(rotation=0.3, flip_x=0.5, photometric=True, grid_mask=1.0)
    dataset = NuScenesDataset(root, VERSION, "mini_train", recipe.data, augment=augment)
    objects = load_objects(dataset, Paste())
    assert set(objects.pictures[:, 1]) <= set(range(5)) and len(objects.pictures)  # column 1: the view
    rng = np.random.default_rng(0)
    batch = collate([dataset.with_objects(objects).read(i, rng) for i in range(2)]).to("cpu")
    net = Pretrain(recipe)
    losses, _ = net(batch, seeded_generators(0, 1))
    sum(losses.values()).backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    picture = rendered_views(net, batch, seeded_generators(0, 1), stride=16)
    assert picture.shape[1] > 5 * 240  # five cameras, each 240 pixels wide


@pytest.mark.slow
def test_eight_cameras_of_eight_sizes_through_all_scripts(city_copy, tmp_path):
    """Half of the cameras have PNGs, half of the images are smaller than the tables say, one frame of each split misses
    a file."""
    set_rig(city_copy, RIGS[8])
    rows = [row for row in read(city_copy, "sample_data") if "cam" in row["filename"]]
    for row in rows[::2]:
        file = city_copy / row["filename"]
        image = cv2.imread(str(file))
        cv2.imwrite(str(file), cv2.resize(image, (row["width"] // 2, row["height"] // 2)))
    (city_copy / rows[0]["filename"]).unlink()  # of mini_train
    (city_copy / rows[-1]["filename"]).unlink()  # of mini_val
    of_train = ["train.py", *TRAIN_FLAGS, "--val-every", 1, "--out", tmp_path / "train"]
    of_finetune = ["finetune.py", *FINETUNE_FLAGS, "--pretrained", tmp_path / "train", "--out", tmp_path / "finetune"]
    for arguments in (of_train, of_finetune):
        done = scripts.run(
            *arguments, "--modality", "camera", "--preset", "tiny", "--data-root", city_copy, "--steps", 1
        )
        # once for each split
        assert done.returncode == 0 and done.stderr.count("1 of 3 frames are left out") == 2, done.stderr
    assert curve(tmp_path / "train", "val/psnr")[1] > 0 and curve(tmp_path / "finetune")[1] > 0
    for run, flags in (("train", ["--picture-stride", 8]), ("finetune", ["--batch-size", 8])):
        done = scripts.run("eval.py", tmp_path / run, *flags, "--pictures", 1, "--device", "cpu", "--workers", 0)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / run / "eval").glob("*.png"))) == 1


def test_a_frame_without_one_of_the_cameras_is_left_out(city_copy, capsys):
    """The camera is kept, since the other frames have it."""
    rows = read(city_copy, "sample_data")
    removed = next(row for row in rows if "CAM_BACK/" in row["filename"] and row["is_key_frame"])
    for row in rows:
        if row["prev"] == removed["token"]:
            row["prev"] = ""
    write(city_copy, "sample_data", [row for row in rows if row is not removed])
    datasets = [NuScenesDataset(city_copy, VERSION, split, Data()) for split in ("mini_train", "mini_val")]
    assert sum(map(len, datasets)) == 5 and all(len(d[0].images) == 6 for d in datasets)
    assert "1 of 3 frames are left out; missing: CAM_BACK in the tables" in capsys.readouterr().err
    assert sum(len(NuScenesDataset(city_copy, VERSION, d.split, Data(cameras=False))) for d in datasets) == 6


def test_a_dataset_without_cameras_is_read(city_copy):
    set_rig(city_copy, {})
    assert not NuScenesDataset.has_images(city_copy, VERSION, "mini_val")
    for data in (Data(), Data(cameras=False), Data(camera_sweeps=2)):
        sample = NuScenesDataset(city_copy, VERSION, "mini_val", data)[0]
        assert not sample.images and sample.lidar2image.shape == (0, 4, 4) and len(sample.points)


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_scaled_copy_of_an_image_keeps_its_geometry(city_copy, scale):
    """If files are not 72 x 128 as the tables say, intrinsics are scaled, with and without `image_size`."""
    before = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0]
    resized = NuScenesDataset(city_copy, VERSION, "mini_val", Data(image_size=(40, 60)))[0]
    for file in city_copy.glob("samples/CAM_*/*.jpg"):
        image = cv2.imread(str(file))
        # one row less than the exact size, as rounding may give it
        cv2.imwrite(str(file), cv2.resize(image, (round(128 * scale), round(72 * scale) - 1)))
    after = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0]
    h, w = after.images[0].shape[:2]
    assert (h, w) == (round(72 * scale) - 1, round(128 * scale))
    scaled = np.diag([w / 128, h / 72, 1, 1]) @ before.lidar2image
    np.testing.assert_allclose(after.lidar2image, scaled, rtol=1e-5, atol=1e-3)
    again = NuScenesDataset(city_copy, VERSION, "mini_val", Data(image_size=(40, 60)))[0]
    np.testing.assert_allclose(again.lidar2image, resized.lidar2image, rtol=1e-5, atol=1e-3)


def test_the_orientation_in_exif_data_is_ignored(city_copy):
    """A viewer would rotate the image by 180 degrees; the calibration is that of the stored pixels."""
    from PIL import Image

    before = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0].images
    for file in city_copy.glob("samples/CAM_*/*.jpg"):
        exif = Image.Exif()
        exif[0x0112] = 3  # orientation: rotated by 180 degrees
        with Image.open(file) as image:
            image.save(file, exif=exif, quality=100)
    after = NuScenesDataset(city_copy, VERSION, "mini_val", Data())[0].images
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(after, before, strict=True)) < 3  # of 255: JPEG loss


def test_frames_with_missing_files_are_left_out_and_named(city_copy, capsys):
    """Only files that are read count: a LiDAR run needs no image."""
    index = NuScenesDataset(city_copy, VERSION, "mini_val", Data(sweeps=2)).index
    # an image of frame 0, and the sweep before the keyframe of frame 2
    removed = [index.image_files[0, 3].decode(), index.lidar_files[index.lidar_prev[index.frame_lidar[2]]].decode()]
    for name in removed:
        (city_copy / name).unlink()
    # (whether images are read, LiDAR frames per sample) -> frames that remain
    expected = {(True, 1): [1, 2], (True, 2): [1], (False, 1): [0, 1, 2], (False, 2): [0, 1]}
    for (cameras, sweeps), frames in expected.items():
        capsys.readouterr()
        dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data(cameras=cameras, sweeps=sweeps))
        assert dataset.frames.tolist() == frames and all(dataset[i].token for i in range(len(frames)))  # readable
        printed = capsys.readouterr().err
        assert (f"{3 - len(frames)} of 3 frames are left out; missing: " in printed) == (len(frames) < 3)
        assert [name in printed for name in removed] == [cameras, sweeps == 2]
        assert {i for rows in dataset.scenes().values() for i in rows} == set(range(len(frames)))
    for file in city_copy.glob("samples/CAM_FRONT/*"):
        file.unlink()
    assert not NuScenesDataset.has_images(city_copy, VERSION, "mini_val")
    with pytest.raises(DataError, match="no frame of .* mini_val has all its files; .*: 1 of samples/CAM_BACK, 3 of"):
        NuScenesDataset(city_copy, VERSION, "mini_val", Data())
    for script in (train, finetune):
        args = script.parse(["--modality", "camera", "--preset", "tiny", "--data-root", city_copy])
        with pytest.raises(
            DataError, match="no frame of .* mini_train has all its files; .* missing: samples/CAM_FRONT/"
        ):
            script.open_datasets(args, World(0, 1, torch.device("cpu")))


def test_a_dataset_without_its_sweep_files_is_a_user_error(city_copy):
    for file in city_copy.glob("sweeps/LIDAR_TOP/*"):
        file.unlink()
    with pytest.raises(
        DataError, match="has none of the sweeps, such as .*; unpack them, or .* with --data.sweeps 1.$"
    ):
        NuScenesDataset(city_copy, VERSION, "mini_train", Data(sweeps=10))
    assert len(NuScenesDataset(city_copy, VERSION, "mini_train", Data(sweeps=1))) == 3
    rows = read(city_copy, "sample_data")  # without sweeps in the tables too, earlier keyframes are used instead
    sweeps = {row["token"]: row for row in rows if not row["is_key_frame"]}
    for row in rows:
        while row["prev"] in sweeps:
            row["prev"] = sweeps[row["prev"]]["prev"]
    write(city_copy, "sample_data", [row for row in rows if row["token"] not in sweeps])
    dataset = NuScenesDataset(city_copy, VERSION, "mini_val", Data(sweeps=10))
    # time lags: one for each keyframe whose points are in the cloud
    assert [len(set(dataset[i].points[:, 4])) for i in range(3)] == [1, 2, 3]
