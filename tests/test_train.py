"""train.py as a user runs it: in a separate process, on a small synthetic dataset, on the CPU (one test: a GPU)."""

import json
import time

import pytest
import torch

from tests import scripts
from tests.scripts import Script

pytestmark = pytest.mark.slow
# Few rays with few samples each. No checkpoint before the end of the run and no validation, unless a test asks for them
SMALL = ["--device", "cpu", "--workers", "0", "--rays.per-view", "8", "--log-every", "1", "--save-every", "99"]
SMALL += ["--val-every", "0", "--val-samples", "1", "--picture-stride", "16"]
SMALL += ["--render.samples", "12", "--render.importance", "4"]


def run_train(*flags, cwd, launch=scripts.run, check=True):
    """Run train.py in `cwd` with the flags SMALL and `flags`, which override them; returns the finished process.

    launch: `scripts.run`, or `scripts.run_two` for two processes. check: assert that the exit code is 0.
    """
    done = launch("train.py", *SMALL, *flags, cwd=cwd)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def curve(run, name="train/loss"):
    """{step: value} of the scalar `name` in the log of a run folder."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r[name] for r in records if name in r}


def checkpoint(run):
    """The last checkpoint of a run folder."""
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(city, tmp_path_factory):
    """An uninterrupted run of eight steps: (run folder, finished process)."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    flags = ["--data-root", city, "--preset", "tiny", "--steps", 8, "--val-every", 3, "--out", run]
    return run, run_train(*flags, cwd=run.parent)


def test_a_run_writes_all_its_files(uninterrupted):
    run, done = uninterrupted
    config = json.loads((run / "config.json").read_text())
    assert config["steps"] == 8 and config["recipe"]["rays"]["per_view"] == 8
    first = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert {"command", "commit", "versions", "gpu", "config"} <= first.keys()
    assert sorted(curve(run)) == list(range(1, 9))
    assert sorted(curve(run, "val/psnr")) == [0, 3, 6, 8]
    assert list((run / "tensorboard").iterdir())
    assert (run / "images" / "val_000008.png").stat().st_size > 10_000
    assert (run / "checkpoints" / "step_8.pt").exists()
    assert "depth_abs_rel" in done.stdout and "tensorboard --logdir" in done.stdout


def test_tensorboard_has_curves_and_pictures(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted[0] / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/rgb", "train/depth", "train/lr", "train/samples_per_s", "train/rays_per_s"} <= tags
    assert {"val/psnr", "val/depth_abs_rel", "val/depth_rmse", "val/depth_delta1"} <= tags
    assert events.Tags()["images"] == ["val"]


def test_a_stopped_and_resumed_run_is_bit_equal(uninterrupted, city, tmp_path):
    """Its weights are those of an uninterrupted run that, unlike this one, also validates."""
    flags = ["--data-root", city, "--preset", "tiny", "--steps", 8, "--out", tmp_path / "run"]
    run_train(*flags, "--stop-at", 3, cwd=tmp_path)
    assert checkpoint(tmp_path / "run")["step"] == 3
    # --checkpointing and --tune change memory and speed, but no result
    run_train(*flags, "--resume", "auto", "--checkpointing", "--tune", cwd=tmp_path)
    assert_same_weights(tmp_path / "run", uninterrupted[0])


def test_a_killed_and_resumed_run_is_bit_equal(uninterrupted, city, tmp_path):
    """Killed with SIGKILL midway; --resume auto finds it. Weights and losses are those of an uninterrupted run."""
    flags = ["--data-root", str(city), "--preset", "tiny", "--steps", "8", "--save-every", "1"]
    process = Script("train.py", *SMALL, *flags, cwd=tmp_path)
    last = wait_for(lambda: list(tmp_path.glob("outputs/train-camera/*/checkpoints/last.pt")), process)[0]
    process.kill()
    process.wait()
    run = last.parent.parent
    killed_after = checkpoint(run)["step"]
    assert 0 < killed_after < 8
    # as if it had logged steps after its last checkpoint, and was killed while it wrote the line of step 8
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "train/loss": 99.0}\n{"step": 8, "train/l')
    done = run_train(*flags, "--resume", "auto", cwd=tmp_path)
    assert f"steps {killed_after} to 8" in done.stdout
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "train/loss" in r] == list(range(1, 9))
    assert curve(run) == curve(uninterrupted[0])
    assert_same_weights(run, uninterrupted[0])


def test_resuming_a_finished_run_prints_its_results(uninterrupted, city, tmp_path):
    run, first = uninterrupted
    done = run_train("--data-root", city, "--preset", "tiny", "--steps", 8, "--resume", run, cwd=tmp_path)
    metrics = slice(-8, -3)  # header and four metrics; the last three lines say where the results are
    assert done.stdout.splitlines()[metrics] == first.stdout.splitlines()[metrics]


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "bf16"],
        ["--precision", "fp16"],
        ["--deterministic"],
        ["--deterministic", "--render.method", "volsdf"],
    ],
    ids=" ".join,
)
def test_half_precisions_train_and_deterministic_runs_have_equal_losses(flags, city, tmp_path):
    """On a GPU if there is one. --deterministic runs twice; --precision bf16 also validates."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = [tmp_path / name for name in (("a", "b") if "--deterministic" in flags else ("a",))]
    for run in runs:
        common = ["--data-root", city, "--preset", "tiny", "--steps", 2, "--out", run]
        common += ["--device", device, "--val-every", 2 if "bf16" in flags else 0]
        run_train(*common, *flags, cwd=run.parent)
    assert sorted(curve(runs[0])) == [1, 2] and curve(runs[0]) == curve(runs[-1])


@pytest.mark.parametrize("modality", ["lidar", "fusion"])
def test_lidar_and_fusion_train_and_resume_bit_equal(modality, city, tmp_path):
    flags = ["--modality", modality, "--data-root", city, "--preset", "tiny", "--steps", 4]
    done = run_train(*flags, "--val-every", 4, "--out", tmp_path / "uninterrupted", cwd=tmp_path)
    assert "depth_abs_rel" in done.stdout and ("psnr" in done.stdout) == (modality == "fusion")
    run_train(*flags, "--stop-at", 2, "--out", tmp_path / "run", cwd=tmp_path)
    run_train(*flags, "--resume", tmp_path / "run", cwd=tmp_path)
    assert_same_weights(tmp_path / "run", tmp_path / "uninterrupted")


def test_lidar_trains_without_images(city, tmp_path):
    """Without image files; and with them, but ignored (--data.no-cameras): with the same losses."""
    root = tmp_path / "set"
    root.mkdir()
    for part in ("v1.0-mini", "sweeps", "lidarseg", "maps"):
        (root / part).symlink_to(city / part)
    (root / "samples").mkdir()
    (root / "samples" / "LIDAR_TOP").symlink_to(city / "samples" / "LIDAR_TOP")
    flags = ["--modality", "lidar", "--preset", "tiny", "--steps", 2]
    done = run_train(*flags, "--data-root", root, "--val-every", 2, "--out", tmp_path / "no_files", cwd=tmp_path)
    assert "no training frame has all its images: rays are cast from the LiDAR" in done.stdout
    assert (tmp_path / "no_files" / "images" / "val_000002.png").stat().st_size > 10_000
    run_train(*flags, "--data-root", city, "--data.no-cameras", "--out", tmp_path / "ignored", cwd=tmp_path)
    assert curve(tmp_path / "ignored") == curve(tmp_path / "no_files")


def test_fusion_starts_from_a_camera_and_a_lidar_run(uninterrupted, city, tmp_path):
    flags = ["--data-root", city, "--preset", "tiny", "--steps", 1]
    run_train(*flags, "--modality", "lidar", "--out", tmp_path / "lidar", cwd=tmp_path)
    init = ["--init", uninterrupted[0], tmp_path / "lidar"]
    # with this learning rate, the one step hardly changes the weights
    run_train(*flags, "--modality", "fusion", *init, "--lr", 1e-12, "--out", tmp_path / "fusion", cwd=tmp_path)
    camera, lidar = checkpoint(uninterrupted[0])["model"], checkpoint(tmp_path / "lidar")["model"]
    weights = checkpoint(tmp_path / "fusion")["model"]
    taken = 0
    for name, weight in weights.items():
        source = lidar if name.startswith("encoder.lidar.") else camera
        statistic = "running_" in name or "num_batches" in name  # of a batch norm: the step changes it
        if name.startswith(("encoder.camera.", "encoder.lidar.")) and not statistic:
            torch.testing.assert_close(weight, source[name], rtol=1e-6, atol=1e-9)
            taken += 1
    assert taken > 100  # weights


def test_two_processes_have_the_losses_of_one(city, tmp_path):
    """Up to rounding, at a small learning rate: AdamW's first updates are lr times the signs of gradients, and rounding
    may flip the sign of a small one."""
    flags = ["--data-root", city, "--preset", "tiny", "--steps", 4, "--batch-size", 2, "--lr", 3e-5]
    flags += ["--val-every", 4]
    run_train(*flags, "--out", tmp_path / "one", cwd=tmp_path)
    run_train(*flags, "--out", tmp_path / "two", cwd=tmp_path, launch=scripts.run_two)
    tolerances = {"train/loss": 2e-3, "train/rgb": 2e-3, "train/depth": 2e-3, "train/grad_norm": 2e-2, "val/psnr": 1e-4}
    for name, tolerance in tolerances.items():
        one, two = curve(tmp_path / "one", name), curve(tmp_path / "two", name)
        assert one.keys() == two.keys()
        assert all(one[s] == pytest.approx(two[s], rel=tolerance) for s in one), (name, one, two)


def test_accumulated_micro_batches_have_about_the_loss_and_gradient_norm_of_a_batch(city, tmp_path):
    """In the first step, and only roughly, since batch norm gets one of the two samples at a time. The learning rates
    are equal in all steps."""
    flags = ["--data-root", city, "--preset", "tiny", "--steps", 2, "--batch-size", 2]
    run_train(*flags, "--out", tmp_path / "whole", cwd=tmp_path)
    run_train(*flags, "--out", tmp_path / "halves", "--accumulate", 2, cwd=tmp_path)
    for name in ("train/loss", "train/grad_norm"):
        whole, halves = curve(tmp_path / "whole", name), curve(tmp_path / "halves", name)
        assert 0.5 < whole[1] / halves[1] < 1.5, name
    assert curve(tmp_path / "whole", "train/lr") == curve(tmp_path / "halves", "train/lr")


@pytest.mark.parametrize(
    "flags, words",  # words that the message must contain
    [
        (["--preset", "huge"], ["--preset huge", "tiny"]),
        (["--version", "v1.0-test"], ["--version v1.0-test", "v1.0-mini"]),
        (["--version", "v2"], ["--version v2", "v1.0-mini"]),
        (["--dataset", "no.such:Class"], ["--dataset no.such:Class", "package.module:Class"]),
        (["--version", "v1.0-trainval"], ["v1.0-trainval", "v1.0-mini"]),
        (["--data-root", "nowhere"], ["nowhere"]),
        (["--data-root", "."], ["tables"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["--resume", "nowhere"], ["--resume nowhere"]),
        (["--batch-size", "3", "--accumulate", "2"], ["--batch-size 3"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--out", __file__], ["--out", "is a file"]),
        (["--data.no-cameras"], ["--data.no-cameras", "camera encoder"]),
        (["--data.no-cameras", "--modality", "lidar", "--render.rgb-weight", "1"], ["--render.rgb-weight 0"]),
        (["--preset", "camera-0.1"], ["--init", "--camera.frozen-stages 0"]),
        (["--render.features-weight", "1"], ["--data.features FOLDER", "both"]),
        (["--preset", "features-tiny", "--data.features", "dino"], ["dino", "18 of 18", "CAM_FRONT", "docs/data.md"]),
        (
            ["--preset", "features-tiny", "--data.feature-channels", "8"],
            [".npy", "16 channels, but other files or --data.feature-channels have 8"],
        ),
        (["--init", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_user_error_is_one_sentence(flags, words, city, tmp_path):
    """It is the last line of stderr, and there is no traceback."""
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a GPU: asking for it is no mistake")
    defaults = [] if "--data-root" in flags else ["--data-root", city]
    defaults += [] if "--preset" in flags else ["--preset", "tiny"]
    done = run_train(*defaults, "--steps", 1, *flags, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ") and all(word in sentence for word in words), sentence
    assert "Traceback" not in done.stderr


def test_a_run_does_not_resume_with_other_settings(uninterrupted, city, tmp_path):
    """Nor into another folder; and no new run starts in its folder."""
    run, _ = uninterrupted
    settings = ["--data-root", city, "--preset", "tiny", "--steps", 8]
    flags = [*settings, "--out", run]
    again = run_train(*flags, cwd=tmp_path, check=False)
    assert again.returncode == 2 and "has a run already" in again.stderr
    other = run_train(*flags, "--seed", 1, "--resume", "auto", cwd=tmp_path, check=False)
    assert other.returncode == 2 and "was started with --seed 0, not 1" in other.stderr
    other = run_train(*flags, "--render.samples", 9, "--resume", run, cwd=tmp_path, check=False)
    assert other.returncode == 2 and "was started with --render.samples 12, not 9" in other.stderr
    other = run_train(*settings, "--out", tmp_path / "other", "--resume", run, cwd=tmp_path, check=False)
    assert other.returncode == 2 and f"--resume {run} continues in {run}, so --out" in other.stderr


def wait_for(condition, process, seconds=120):
    """Poll until `condition()` is true, and return its value; `process` must not end before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.02)
    raise AssertionError(f"the condition was not met within {seconds} s")


def assert_same_weights(a, b):
    """Assert that the last checkpoints of two run folders have the same step and bit-equal weights."""
    a, b = checkpoint(a), checkpoint(b)
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
