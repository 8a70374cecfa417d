"""Evaluation: detections through the nuScenes devkit, and eval.py as a user runs it."""

import json
import math
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from eval import main, parse
from tests import scripts
from tests.test_train import wait_for
from unipad.batch import CLASSES
from unipad.boxes import decode_boxes, encode_boxes
from unipad.checkpoint import write_checkpoint
from unipad.config_dict import to_dict
from unipad.data.nuscenes import NuScenesDataset
from unipad.draw.mesh import distances, surface, write_ply
from unipad.draw.views import write_video
from unipad.errors import UserError
from unipad.evaluate.detection import detect_all, evaluate_detections
from unipad.evaluate.submission import MAX_BOXES, table, write_submission
from unipad.model.detect import Detections, Detector
from unipad.model.pretrain import Pretrain
from unipad.recipes import DETECT, PRETRAIN
from unipad.runtime import World

ONE_PROCESS = World(rank=0, size=1, device=torch.device("cpu"))
RECIPE = DETECT["lidar"]["tiny"]
NO_DETECTIONS = Detections(torch.zeros(0, 9), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def tiny_detector():
    """An untrained model, small enough for a test."""
    head = replace(RECIPE.detect, queries=20, layers=1)
    return Detector(replace(RECIPE, detect=head))


def validation(root, **settings):
    return NuScenesDataset(root, "v1.0-mini", "mini_val", replace(RECIPE.data, **settings))


def perfect_detector(batch):
    """The ground-truth boxes of a batch as detections, encoded and decoded as the head's are."""
    labels = batch.labels.split(batch.box_counts.tolist())
    boxes = decode_boxes(encode_boxes(batch.boxes)).split(batch.box_counts.tolist())
    return [Detections(b, torch.ones(len(b)), l) for b, l in zip(boxes, labels, strict=True)]


def test_ground_truth_scores_one(city, tmp_path):
    """The boxes pass through the box coder, the JSON file and the devkit."""
    model = tiny_detector().train()
    metrics = evaluate_detections(model, validation(city), tmp_path / "eval", ONE_PROCESS, perfect_detector)
    assert model.training  # its mode was restored
    summary = json.loads((tmp_path / "eval" / "metrics_summary.json").read_text())
    print(table(summary))
    # NDS also counts the attributes, which are guessed from class and speed
    assert metrics["NDS"] == summary["nd_score"] >= 0.99 and metrics["mAP"] > 0.999
    assert max(metrics[name] for name in ("mATE", "mASE", "mAOE")) < 1e-3
    assert metrics["mAVE"] < 0.05  # m/s


def test_no_detections_score_zero(city, tmp_path):
    model = tiny_detector()
    metrics = evaluate_detections(model, validation(city), tmp_path, ONE_PROCESS, lambda batch: [NO_DETECTIONS])
    assert metrics == {"NDS": 0, "mAP": 0, "mATE": 1, "mASE": 1, "mAOE": 1, "mAVE": 1, "mAAE": 1}
    written = json.loads((tmp_path / "results_nusc.json").read_text())
    assert set(written["results"]) == set(tokens(validation(city))) and not any(written["results"].values())
    text = table(json.loads((tmp_path / "metrics_summary.json").read_text()))
    assert "mAP: 0.0000" in text and "NDS: 0.0000" in text
    per_class = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-len(CLASSES) :]}  # AP, five errors
    assert per_class.keys() == set(CLASSES)
    assert per_class["car"] == ["0.000"] + 5 * ["1.000"]
    # ATE and ASE, but no AOE, AVE, AAE: cones have neither heading nor velocity nor attribute
    assert per_class["traffic_cone"] == ["0.000", "1.000", "1.000", "nan", "nan", "nan"]


def tokens(dataset):
    return [token.decode() for token in dataset.index.tokens]


def test_unreadable_frames_are_named_and_get_no_boxes(city, tmp_path, capsys):
    root = shutil.copytree(city, tmp_path / "city")
    dataset = validation(root)
    lidar = [root / dataset.index.lidar_files[row].decode() for row in dataset.index.frame_lidar]
    lidar[1].write_bytes(lidar[1].read_bytes()[:-7])  # cuts the last point in two
    model = tiny_detector()
    detected = detect_all(model, dataset, ONE_PROCESS, perfect_detector, batch_size=2)
    assert list(detected) == [tokens(dataset)[i] for i in (0, 2)]
    out, err = capsys.readouterr()
    assert f"skipped {lidar[1]}: is truncated" in err
    assert "incomplete: 1 of 3 frames of mini_val have no prediction" in out and "frames without detections" in out
    lidar[2].rename(lidar[2].with_suffix(".away"))  # a new dataset leaves this frame out
    detect_all(model, validation(root), ONE_PROCESS, perfect_detector)
    assert "incomplete: 2 of 3 frames of mini_val have no prediction" in capsys.readouterr().out
    lidar[2].with_suffix(".away").rename(lidar[2])
    metrics = evaluate_detections(model, dataset, tmp_path / "eval", ONE_PROCESS, perfect_detector)
    assert 0.3 < metrics["mAP"] < 0.9  # one of the three frames has no detections
    for file in lidar:
        file.unlink()
    with pytest.raises(UserError, match="none of the 3 frames can be read .*is missing"):
        detect_all(model, dataset, ONE_PROCESS)


def test_a_submission_by_hand(city, tmp_path):
    """Attributes depend on class and speed; the best 500 boxes are kept; boxes that the devkit rejects are dropped.

    The LiDAR frame is made the global frame, so that boxes are written with the coordinates that they have here.
    """
    dataset = validation(city)
    index = replace(dataset.index, lidar2global=np.tile(np.eye(4), (len(dataset.index.lidar2global), 1, 1)))
    boxes = torch.tensor([[1.0, 2, 3, 2, 4, 1.5, 0, 0, 0]]).repeat(7, 1)  # x, y, z, w, l, h, yaw, vx, vy
    boxes[1, 7] = boxes[3, 8] = 0.21  # m/s: above 0.2, objects count as moving
    boxes[4, 3], boxes[5, 0] = 0, math.nan  # rejected by the devkit
    names = ["car", "car", "pedestrian", "bicycle", "car", "car", "barrier"]
    labels = torch.tensor([CLASSES.index(name) for name in names])
    few = Detections(boxes, torch.linspace(0.1, 0.7, 7), labels)  # the best last; written best first
    many = Detections(boxes[:1].expand(600, 9), torch.arange(600) / 600, labels[:1].expand(600))
    file = tmp_path / "results_nusc.json"
    first, second, third = tokens(dataset)
    write_submission({first: few, second: many}, index, file, use_camera=False, use_lidar=True)
    written = json.loads(file.read_text())
    assert written["meta"] == {
        "use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False,
    }  # fmt: skip
    records = written["results"][first]
    assert [(r["detection_name"], r["attribute_name"]) for r in records] == [
        ("barrier", ""),
        ("bicycle", "cycle.with_rider"),
        ("pedestrian", "pedestrian.standing"),
        ("car", "vehicle.moving"),
        ("car", "vehicle.parked"),
    ]
    assert records[-1] == {
        "sample_token": first,
        "translation": [1, 2, 3],
        "size": [2, 4, 1.5],
        "rotation": [1, 0, 0, 0],
        "velocity": [0, 0],
        "detection_name": "car",
        "detection_score": pytest.approx(0.1),
        "attribute_name": "vehicle.parked",
    }
    scores = [r["detection_score"] for r in written["results"][second]]
    assert len(scores) == MAX_BOXES and min(scores) == pytest.approx(100 / 600)
    assert written["results"][third] == []


def save_run(folder, model, root, recipe=None):
    """Write a run folder for eval.py, and return it.

    root: root of the dataset, recorded in the checkpoint; None: not recorded, as in checkpoints of `unipad.convert`.
    recipe: recorded instead of the model's.
    """
    (folder / "checkpoints").mkdir(parents=True)
    args = {"data_root": str(root), "version": "v1.0-mini"} if root else {}
    config = {"args": args, "recipe": to_dict(recipe or model.recipe), "steps": 1}
    write_checkpoint({"model": model.state_dict(), "config": config, "step": 1}, folder / "checkpoints" / "last.pt")
    return folder


@pytest.fixture(scope="module")
def detector_run(city, tmp_path_factory):
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("runs") / "detector", tiny_detector(), city)


@pytest.fixture(scope="module")
def camera_run(city, tmp_path_factory):
    torch.manual_seed(0)
    return save_run(tmp_path_factory.mktemp("runs") / "camera", Pretrain(PRETRAIN["camera"]["tiny"]), city)


def evaluate(run, *flags):
    """Run eval.py in this process."""
    main(parse([run, "--device", "cpu", "--workers", 0, *flags]))


def evaluate_in_own_process(checkpoint, *flags, start=scripts.run):
    """Run eval.py as a user does, in its own process."""
    return start("eval.py", checkpoint, "--device", "cpu", "--workers", 0, *flags)


def test_a_detector_is_evaluated_and_its_boxes_are_drawn(detector_run):
    done = evaluate_in_own_process(detector_run, "--pictures", 1)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "NDS: 0." in done.stdout and "Per-class results:" in done.stdout and "traffic_cone" in done.stdout
    out = detector_run / "eval"
    written = json.loads((out / "results_nusc.json").read_text())["results"]
    # each of the 20 queries may give a box of each class
    assert len(written) == 3 and all(len(boxes) > 100 for boxes in written.values())
    assert json.loads((out / "metrics_summary.json").read_text())["mean_ap"] < 0.05
    assert np.asarray(Image.open(out / "boxes_0.png")).std() > 20  # not blank


def test_a_folder_of_results_that_another_program_uses_is_refused(detector_run, tmp_path):
    """POSIX locks do not exclude the process that holds them, so another process holds the lock here."""
    code = "import sys, time, unipad.run_folder as f\nwith f._locked(f.Path(sys.argv[1])): time.sleep(60)"
    holder, lock = scripts.Script("-c", code, tmp_path / "eval"), tmp_path / "eval" / ".lock"
    wait_for(lambda: lock.exists() and lock.read_text(), holder)
    with pytest.raises(UserError, match="eval is in use by another program .process .* with --out"):
        evaluate(detector_run, "--out", tmp_path / "eval")
    holder.kill()
    holder.wait()


def test_a_converted_checkpoint_is_evaluated_on_the_synthetic_dataset(city, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "synthetic").symlink_to(city)  # the dataset of eval.py where none is given or recorded
    monkeypatch.chdir(tmp_path)
    run = save_run(tmp_path / "run", tiny_detector(), None)
    file = (run / "checkpoints" / "last.pt").rename(tmp_path / "lidar.pt")
    evaluate(file, "--pictures", 1)
    assert "NDS: 0." in capsys.readouterr().out and (tmp_path / "eval" / "boxes_0.png").exists()


def test_two_processes_have_the_detections_of_one(detector_run, tmp_path):
    done = evaluate_in_own_process(detector_run, "--pictures", 1, "--out", tmp_path / "two", start=scripts.run_two)
    assert done.returncode == 0, done.stderr[-4000:]
    evaluate(detector_run, "--pictures", 1, "--out", tmp_path / "one")
    one, two = ((tmp_path / name / "results_nusc.json").read_text() for name in ("one", "two"))
    assert one == two


def test_tta_writes_boxes_that_the_devkit_scores(detector_run, tmp_path, capsys):
    flags = ["--tta", "--tta-scales", 1.0, 1.06, "--no-tta-flips", "--pictures", 1]
    evaluate(detector_run, *flags, "--out", tmp_path)
    assert "NDS: 0." in capsys.readouterr().out
    assert all(json.loads((tmp_path / "results_nusc.json").read_text())["results"].values())


def test_the_test_split_gives_only_a_submission(detector_run, city, tmp_path, capsys):
    """The dataset is made to look like nuScenes' test set: with names of its scenes and no annotations."""
    root = shutil.copytree(city, tmp_path / "set", ignore=shutil.ignore_patterns("unipad-index"))
    tables = root / "v1.0-test"
    (root / "v1.0-mini").rename(tables)
    scenes = json.loads((tables / "scene.json").read_text())
    (tables / "scene.json").write_text(json.dumps([s | {"name": f"scene-{77 + i:04}"} for i, s in enumerate(scenes)]))
    for name in ("sample_annotation", "instance"):
        (tables / f"{name}.json").write_text("[]")
    (tables / "lidarseg.json").unlink()
    flags = ["--data-root", root, "--version", "v1.0-test", "--split", "test", "--pictures", 1]
    evaluate(detector_run, *flags, "--out", tmp_path / "eval")
    assert "no metrics" in capsys.readouterr().out
    written = json.loads((tmp_path / "eval" / "results_nusc.json").read_text())["results"]
    assert len(written) == 2 * 3  # scenes x keyframes
    assert not (tmp_path / "eval" / "metrics_summary.json").exists()


def test_eval_writes_metrics_frames_a_video_and_meshes_of_a_scene(camera_run, tmp_path, capsys):
    pytest.importorskip("skimage")
    flags = ["--scene", "scene-0103", "--picture-stride", 16, "--mesh", "--mesh-cell", 4.0]
    evaluate(camera_run, *flags, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "psnr" in printed and "depth_rmse" in printed
    written = json.loads((tmp_path / "render.json").read_text())
    assert written["frames"] == [0, 1, 2] and 0 < written["psnr"] < 30
    video = Image.open(tmp_path / "scene-0103.gif")
    assert video.n_frames == 3 and video.size == Image.open(tmp_path / "frame_00002.png").size
    assert video.size[0] > 6 * 240  # pixels: six cameras, at least 240 wide each, and a column of captions
    assert len(list(tmp_path.glob("mesh_*.ply"))) == 3
    header, _ = (tmp_path / "mesh_00000.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex" in header
    write_video(sorted(tmp_path.glob("frame_*.png")), tmp_path / "video.mp4", fps=4)
    video = cv2.VideoCapture(str(tmp_path / "video.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and video.get(cv2.CAP_PROP_FPS) == 4


def test_frames_are_rendered_by_number_with_and_without_masks(camera_run, tmp_path, city):
    """With --no-masked, the row of masked images is left out. A frame with a missing file is skipped."""
    root = shutil.copytree(city, tmp_path / "set")
    dataset = validation(root)
    (root / dataset.index.image_files[1][0].decode()).unlink()
    flags = ["--data-root", root, "--frames", 2, 1, "--picture-stride", 16]
    evaluate(camera_run, *flags, "--out", tmp_path / "masked")
    evaluate(camera_run, *flags, "--out", tmp_path / "whole", "--no-masked")
    masked, whole = (Image.open(tmp_path / name / "frame_00002.png") for name in ("masked", "whole"))
    assert masked.size[0] == whole.size[0] and masked.size[1] > whole.size[1] + 50
    assert json.loads((tmp_path / "whole" / "render.json").read_text())["frames"] == [2]


def test_the_mesh_of_a_ball_faces_outward(tmp_path):
    """A ball of radius 3 m around (1, -2, 0): vertices lie on its surface, and the triangles enclose its volume."""
    pytest.importorskip("skimage")
    cell, low = 0.25, np.array([-4.0, -7, -5])
    axes = [np.arange(l, l + 10, cell) for l in low]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    values = (np.linalg.norm(grid - [1, -2, 0], axis=-1) - 3).astype(np.float32)
    vertices, triangles = surface(values, low, cell)
    assert np.linalg.norm(vertices - [1, -2, 0], axis=1) == pytest.approx(3, abs=0.01)
    # the signed volume is positive, so the triangles are counter-clockwise seen from outside
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    assert (np.cross(a, b) * c).sum() / 6 == pytest.approx(4 / 3 * math.pi * 3**3, rel=0.02)
    write_ply(tmp_path / "ball.ply", vertices, triangles)
    header, body = (tmp_path / "ball.ply").read_bytes().split(b"end_header\n")
    assert f"element vertex {len(vertices)}\n".encode() in header
    # bytes: three fp32 coordinates per vertex; a 1-byte count and three int32 indices per triangle
    vertex_bytes, triangle_bytes = 3 * 4 * len(vertices), (1 + 3 * 4) * len(triangles)
    assert len(body) == vertex_bytes + triangle_bytes
    assert np.array_equal(np.frombuffer(body[:vertex_bytes], "<f4").reshape(-1, 3), vertices)
    assert [len(array) for array in surface(np.ones((3, 3, 3)), low, cell)] == [0, 0]  # all outside: no surface


def test_distances_are_the_sdf_in_meters():
    recipe = PRETRAIN["camera"]["tiny"]
    model, grid = Pretrain(recipe).eval(), recipe.grid
    X, Y, Z = grid.shape
    volume = torch.randn(1, recipe.render.channels, Z, Y, X)
    values = distances(model, volume, 4.0)
    assert values.shape == (20, 20, 3)  # a range of 80 x 80 x 12 m in steps of 4 m
    # the field takes and returns lengths in units of 1 / grid.scale meters
    point = (torch.tensor(grid.low) + 4 * torch.tensor([3, 7, 1])) * grid.scale
    volume_idx = torch.zeros(1, dtype=torch.int32)
    sdf = model.renderer.field.sdf(volume.permute(0, 2, 3, 4, 1).contiguous(), point[None, None], volume_idx)
    assert values[3, 7, 1].item() == pytest.approx(sdf.item() / grid.scale, rel=1e-4, abs=1e-4)


# Run, flags, parts of the error message
USER_ERRORS = [
    ("detector", ["--task", "render"], ["--task render", "train.py"]),
    ("camera", ["--task", "detect"], ["--task detect", "finetune.py"]),
    ("camera", ["--task", "segment"], ["--task segment", "finetune.py --task segment", "train.py"]),
    ("camera", ["--tta"], ["--tta", "finetune.py"]),
    ("detector", ["--mesh"], ["--mesh", "train.py"]),
    ("detector", ["--split", "test"], ["split test", "mini_val", "v1.0-test"]),
    ("detector", ["--split", "everything"], ["split everything", "mini_val"]),
    ("detector", ["--version", "v1.0-trainval"], ["v1.0-trainval", "v1.0-mini"]),
    ("detector", ["--data-root", "nowhere"], ["--data-root nowhere"]),
    ("detector", ["--out", __file__], ["--out", "is a file"]),
    ("detector", ["--tta", "--tta-scales", 0.0], ["--tta-scales"]),
    ("detector", ["--tta", "--tta-scales", "nan"], ["--tta-scales nan"]),
    ("detector", ["--batch-size", 10**12], ["--batch-size"]),
    ("camera", ["--mesh", "--mesh-cell", "1e-320"], ["--mesh-cell 1e-320"]),
    ("camera", ["--mesh", "--mesh-cell", 1e-4], ["--mesh-cell 0.0001", "GB"]),
    ("camera", ["--scene", "scene-0103", "--video-fps", 1e-8], ["--video-fps 1e-08"]),
    ("detector", ["--min-score", 5], ["--min-score 5"]),
    ("detector", ["--tta-angles", 90.0], ["--tta-angles has no effect without --tta"]),
    ("camera", ["--mesh-cell", 1.0], ["--mesh-cell has no effect without --mesh"]),
    ("camera", ["--video", "mp4"], ["--video has no effect without --scene"]),
    ("camera", ["--data.no-cameras"], ["--data.no-cameras", "camera encoder"]),
    ("detector", ["--camera.mask-ratio", 0.5], ["--camera.mask-ratio has no effect", "no camera"]),
    ("detector", ["--detect.queries", 30], ["do not fit the recipe"]),
    ("camera", ["--scene", "scene-0061"], ["--scene scene-0061", "mini_val", "scene-0103"]),
    ("camera", ["--frames", 3], ["--frames 3", "0 to 2"]),
    ("camera", ["--picture-stride", 0], ["--picture-stride 0"]),
]


@pytest.mark.parametrize(
    "run, flags, words", USER_ERRORS, ids=[" ".join(map(str, [run, *flags])) for run, flags, _ in USER_ERRORS]
)
def test_a_user_error_is_one_sentence(run, flags, words, detector_run, camera_run):
    with pytest.raises(UserError) as error:
        evaluate({"detector": detector_run, "camera": camera_run}[run], *flags)
    sentence = str(error.value)
    assert all(word in sentence for word in words) and "\n" not in sentence, sentence


def test_settings_of_the_recipe_are_changed_for_evaluation(detector_run, tmp_path):
    """--detect.nms without values turns NMS off, which could leave fewer than `max_detections` boxes."""
    evaluate(detector_run, "--detect.max-detections", 7, "--detect.nms", "--pictures", 1, "--out", tmp_path)
    written = json.loads((tmp_path / "results_nusc.json").read_text())["results"]
    assert {len(boxes) for boxes in written.values()} == {7}


def test_bad_checkpoints_are_rejected(detector_run, city, tmp_path, capsys):
    corrupt = tmp_path / "corrupt.pt"
    corrupt.write_bytes((detector_run / "checkpoints" / "last.pt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "empty").mkdir()
    head = replace(RECIPE.detect, classes=4, queries=20, layers=1)
    four_classes = Detector(replace(RECIPE, detect=head))
    more_queries = replace(RECIPE, detect=replace(RECIPE.detect, queries=30, layers=1))
    for path, word in {
        tmp_path / "nowhere": "no checkpoint",
        tmp_path / "empty": "without checkpoints/last.pt",
        corrupt: "truncated or damaged",
        tmp_path / "other.pt": "has no model",
        save_run(tmp_path / "four_classes", four_classes, city): "4 classes",
        save_run(tmp_path / "more_queries", tiny_detector(), city, more_queries): "do not fit",
    }.items():
        with pytest.raises(UserError) as error:
            evaluate(path)
        assert word in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
