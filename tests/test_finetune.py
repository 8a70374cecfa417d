"""finetune.py: most runs in this process, some in separate processes, as a user starts them."""

import json
from dataclasses import replace

import pytest
import torch

import finetune
import train
from tests import scripts
from tests.test_train import assert_same_weights, checkpoint, curve
from unipad import recipes
from unipad.config import Paste
from unipad.errors import UserError

SMALL = ["--preset", "tiny", "--device", "cpu", "--workers", 0, "--log-every", 1, "--val-every", 0, "--save-every", 99]


def run(out, city, *flags):
    """Run finetune.py in this process and return its run folder; of a flag that is given twice, the last one counts."""
    small = [*SMALL, "--modality", "lidar", "--data-root", city, "--out", out, "--steps", 4]
    finetune.main(finetune.parse([*small, *flags]))
    return out


@pytest.fixture(scope="module")
def uninterrupted(city, tmp_path_factory):
    """A run of four steps from scratch in a separate process: (run folder, finished process)."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    flags = ["--modality", "lidar", "--preset", "tiny", "--data-root", city, "--steps", 4, "--out", out]
    flags += ["--device", "cpu", "--workers", 0, "--log-every", 1, "--val-every", 3, "--save-every", 9]
    done = scripts.run("finetune.py", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done


def test_a_run_writes_all_its_files(uninterrupted):
    out, done = uninterrupted
    assert sorted(curve(out)) == [1, 2, 3, 4] and sorted(curve(out, "val/NDS")) == [3, 4]
    assert {"train/class", "train/box", "train/iou", "train/noisy_class", "val/mAP"} <= {
        name for line in (out / "log.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    results = json.loads((out / "eval" / "results_nusc.json").read_text())
    assert results["meta"]["use_lidar"] and not results["meta"]["use_camera"] and len(results["results"]) == 3
    assert json.loads((out / "eval" / "metrics_summary.json").read_text())["nd_score"] == curve(out, "val/NDS")[4]
    assert (out / "checkpoints" / "step_4.pt").exists() and list((out / "tensorboard").iterdir())
    assert (out / "images" / "val_000004.png").stat().st_size > 10_000
    assert "mini_val" in done.stdout and f"python eval.py {out}" in done.stdout


def test_a_stopped_and_resumed_run_is_bit_equal(uninterrupted, city, tmp_path):
    run(tmp_path / "run", city, "--stop-at", 2)
    assert checkpoint(tmp_path / "run")["step"] == 2
    run(tmp_path / "run", city, "--resume", "auto", "--tune")  # --tune changes no result on a CPU
    assert_same_weights(tmp_path / "run", uninterrupted[0])
    assert curve(tmp_path / "run") == curve(uninterrupted[0])


@pytest.mark.parametrize("modality", ["camera", "fusion"])
def test_camera_and_fusion_detectors_train(modality, city, tmp_path):
    out = run(tmp_path / "run", city, "--modality", modality, "--steps", 2, "--val-every", 2)
    assert curve(out, "train/depth")[2] > 0
    assert json.loads((out / "eval" / "results_nusc.json").read_text())["meta"]["use_camera"]


def test_objects_are_pasted_until_the_last_epochs(city, tmp_path, monkeypatch):
    """Four steps stand for the four epochs of the schedule, and off_epochs is 1: the last step pastes nothing."""
    tiny = recipes.DETECT["lidar"]["tiny"]
    optim = replace(tiny.optim, epochs=4)
    paste = Paste(counts=(12,) * 10, min_points=1, off_epochs=1)  # up to 12 objects of each of the 10 classes
    boxes = {}  # recipe -> number of boxes in each step
    for name, recipe in {
        "plain": replace(tiny, optim=optim),
        "pasted": replace(tiny, optim=optim, paste=paste),
        "balanced": replace(tiny, optim=optim, balanced=True),
        "balanced and pasted": replace(tiny, optim=optim, balanced=True, paste=paste),
    }.items():
        monkeypatch.setitem(recipes.DETECT["lidar"], "tiny", recipe)
        counts = boxes[name] = []
        forward = finetune.Detector.forward

        def recording(self, batch, rngs, counts=counts, forward=forward):
            counts.append(len(batch.boxes))
            return forward(self, batch, rngs)

        with monkeypatch.context() as patch:
            patch.setattr(finetune.Detector, "forward", recording)
            run(tmp_path / name, city, "--lr", 1e-9)  # nothing is learned: only the data matters
    assert boxes["plain"][3] == boxes["pasted"][3]
    assert sum(boxes["pasted"][:3]) > sum(boxes["plain"][:3])
    assert sum(boxes["balanced and pasted"][:3]) > sum(boxes["balanced"][:3])
    assert boxes["balanced and pasted"][3] == boxes["balanced"][3]
    # the last of these recipes is still in use: a resumed run pastes the same objects
    run(tmp_path / "again", city, "--lr", 1e-9, "--stop-at", 2)
    run(tmp_path / "again", city, "--lr", 1e-9, "--resume", "auto")
    assert curve(tmp_path / "again") == curve(tmp_path / "balanced and pasted")


def test_two_processes_have_the_losses_of_one(uninterrupted, city, tmp_path):
    """Only the first step is compared, since rounding grows in later ones; and only losses whose divisor is a mean over
    all processes: the IoU loss, for example, is a mean within each process."""
    flags = ["--modality", "lidar", "--preset", "tiny", "--data-root", city, "--steps", 1, "--out", tmp_path / "two"]
    flags += ["--device", "cpu", "--workers", 0, "--log-every", 1, "--batch-size", 2]
    done = scripts.run_two("finetune.py", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    run(tmp_path / "one", city, "--steps", 1, "--batch-size", 2)
    for name in ("train/class", "train/box"):
        assert curve(tmp_path / "one", name)[1] == pytest.approx(curve(tmp_path / "two", name)[1], rel=1e-3), name
    assert curve(tmp_path / "two", "val/NDS").keys() == {1}


def test_pretrained_encoders_are_loaded_and_the_rest_is_listed(city, tmp_path, capsys):
    flags = [*SMALL, "--data-root", city, "--steps", 1, "--val-samples", 1, "--rays.per-view", 8]
    flags += ["--picture-stride", 32, "--modality", "lidar", "--out", tmp_path / "runs" / "pre"]
    train.main(train.parse(flags))
    capsys.readouterr()
    out = run(tmp_path / "run", city, "--pretrained", tmp_path / "runs", "--steps", 1, "--lr", 1e-12)
    output = capsys.readouterr().out
    assert "took 0.25 M weights, encoder.lidar.backbone, encoder.lidar.encoder, encoder.lidar.neck" in output
    assert "ignored project, renderer" in output
    source, weights = checkpoint(tmp_path / "runs" / "pre")["model"], checkpoint(out)["model"]
    # --lr 1e-12 keeps the weights, but the step updates the buffers of batch norms: running_*, num_batches_tracked
    taken = [name for name in weights if name.startswith("encoder.") and "running" not in name and "num" not in name]
    for name in taken:
        torch.testing.assert_close(weights[name], source[name], rtol=1e-5, atol=1e-9)
    with pytest.raises(UserError, match="--pretrained .* does not fit"):
        run(tmp_path / "other", city, "--modality", "camera", "--pretrained", tmp_path / "runs" / "pre")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="broken.pt is not a checkpoint"):
        run(tmp_path / "other", city, "--pretrained", tmp_path / "broken.pt")


@pytest.mark.parametrize("modality", ["camera", "lidar"])
def test_a_frozen_encoder_keeps_its_weights(modality, city, tmp_path):
    """The weights of the encoder stay; the statistics of its batch norms and the head do not."""
    flags = ["--modality", modality, "--freeze-encoder"]
    out = run(tmp_path / "run", city, *flags, "--stop-at", 1)
    before = checkpoint(out)["model"]
    run(out, city, *flags, "--resume", "auto")
    after = checkpoint(out)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert {name for name in changed if name.startswith("encoder.") and not name.endswith(statistics)} == set()
    assert any(name.startswith("head.") for name in changed)
    # the tiny camera encoder has no batch norms
    assert any(name.endswith("running_mean") for name in changed) == (modality == "lidar")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "huge"], "--preset huge is not known; use tiny"),
        (["--version", "v1.0-trainval"], "has no --version v1.0-trainval"),
        (["--label-fraction", 0.3], "--label-fraction 0.3 is not 1/k"),
        (["--batch-size", 3, "--accumulate", 2], "--batch-size 3 cannot be split"),
        (["--pretrained", "nowhere"], "there is no checkpoint nowhere"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_flags_are_explained(flags, words, city, tmp_path):
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", city, *flags)
