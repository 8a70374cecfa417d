"""What follows a run of images alone, on a dataset without any LiDAR file: resuming, evaluation, two processes, and
fine-tuning from it."""

import json
import shutil

import pytest
import torch

import eval
import finetune
import train
from tests import scripts
from tests.test_train import assert_same_weights, checkpoint, curve

pytestmark = pytest.mark.slow
SMALL = ["--device", "cpu", "--workers", 0, "--log-every", 1, "--save-every", 99, "--val-samples", 1]
SMALL += ["--picture-stride", 16, "--data.image-size", 64, 96, "--rays.per-view", 8, "--rays.patch-step", 2]
SMALL += ["--render.samples", 12, "--render.importance", 4, "--val-every", 0]


@pytest.fixture(scope="module")
def root(city, tmp_path_factory):
    """Root of a copy of `city` that has images alone."""
    copy = tmp_path_factory.mktemp("images") / "city"
    shutil.copytree(city, copy, ignore=shutil.ignore_patterns("unipad-index", "LIDAR_TOP", "lidarseg*", "features"))
    assert not list(copy.rglob("*.bin"))
    return copy


def flags_of(root, out, *flags):
    return ["--preset", "images-tiny", *SMALL, "--data-root", root, "--out", out, *flags]


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    """The folder of a run of four steps that ends with a validation."""
    out = tmp_path_factory.mktemp("images-run") / "run"
    train.main(train.parse(flags_of(root, out, "--steps", 4, "--val-every", 4)))
    assert curve(out, "train/photometric").keys() == {1, 2, 3, 4} and curve(out, "val/psnr").keys() == {0, 4}
    assert not curve(out, "train/depth") and not curve(out, "val/depth_abs_rel")
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_and_resumed_run_is_bit_equal(uninterrupted, root, tmp_path, workers):
    """With any number of processes that load data."""
    flags = flags_of(root, tmp_path / "run", "--steps", 4, "--workers", workers)
    train.main(train.parse([*flags, "--stop-at", 2]))
    assert checkpoint(tmp_path / "run")["step"] == 2
    train.main(train.parse(["--resume", tmp_path / "run", "--workers", workers]))
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_its_settings_are_used_again(uninterrupted, tmp_path):
    train.main(train.parse(["--config", uninterrupted, "--out", tmp_path / "run", "--stop-at", 1, "--val-every", 0]))
    assert curve(tmp_path / "run")[1] == curve(uninterrupted)[1]


def test_it_is_evaluated_by_its_colors(uninterrupted, city, tmp_path, capsys):
    """And by its depths, where there are LiDAR points."""
    for data_root in (None, city):
        flags = ["--device", "cpu", "--picture-stride", 16, "--frames", 0, 1, "--out", tmp_path]
        eval.main(eval.parse([uninterrupted, *flags, *([] if data_root is None else ["--data-root", data_root])]))
        assert "psnr" in capsys.readouterr().out
        written = json.loads((tmp_path / "render.json").read_text())
        assert written["frames"] == [0, 1] and 0 < written["psnr"] < 30
        assert ("depth_abs_rel" in written) == (data_root is not None)
        assert (tmp_path / "frame_00001.png").stat().st_size > 5_000


def test_two_processes_have_the_losses_of_one(root, tmp_path):
    """Up to rounding, at a small learning rate; see the test of this name for the other losses."""
    for name, launch in (("one", scripts.run), ("two", scripts.run_two)):
        flags = flags_of(root, tmp_path / name, "--steps", 3, "--batch-size", 2, "--lr", 3e-5, "--val-every", 3)
        done = launch("train.py", *flags)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, tolerance in {"train/loss": 2e-3, "train/photometric": 5e-3, "val/psnr": 1e-3}.items():
        one, two = (curve(tmp_path / run, name) for run in ("one", "two"))
        assert one.keys() == two.keys() and one
        assert all(one[step] == pytest.approx(two[step], rel=tolerance) for step in one), (name, one, two)


def test_it_initializes_a_detector(uninterrupted, city, tmp_path, capsys):
    """Which has LiDAR for the depth of its images."""
    flags = ["--modality", "camera", "--preset", "tiny", "--device", "cpu", "--workers", 0, "--steps", 1, "--lr", 1e-12]
    flags += ["--data-root", city, "--val-every", 0, "--pretrained", uninterrupted, "--out", tmp_path / "run"]
    finetune.main(finetune.parse(flags))
    assert "took" in (printed := capsys.readouterr().out) and "ignored project, renderer" in printed
    source, weights = checkpoint(uninterrupted)["model"], checkpoint(tmp_path / "run")["model"]
    taken = [name for name in source if name.startswith("encoder.camera.backbone.") and name in weights]
    assert len(taken) > 50
    for name in taken:
        torch.testing.assert_close(weights[name], source[name], rtol=1e-5, atol=1e-9)
