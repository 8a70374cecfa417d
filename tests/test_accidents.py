"""Signals, killed processes, full disks, damaged files, locked or moved folders: a run loses no more than the README
says, and ends with one line that says why. test_damaged.py has more damaged files, accidents.py random moments.
"""

import json
import os
import resource
import shutil
import signal
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import train
from tests import scripts
from tests.accidents import children
from tests.scripts import Script
from tests.test_train import assert_same_weights, checkpoint, curve, wait_for
from unipad.checkpoint import read_checkpoint
from unipad.data.loader import load_items
from unipad.data.nuscenes import NuScenesDataset
from unipad.data.synthetic import generate
from unipad.draw.views import write_video
from unipad.errors import UserError
from unipad.exit import SIGPIPE, Stopped, exit_on_user_error
from unipad.recipes import PRETRAIN
from unipad.run_folder import RunFolder, _drop_records_after, _new_folder
from unipad.runtime import StopOnSignal, World

pytestmark = pytest.mark.slow
SMALL = ["--modality", "lidar", "--preset", "tiny", "--device", "cpu", "--val-every", 0, "--log-every", 1]
SMALL += ["--rays.per-view", 8, "--save-every", 500, "--render.samples", 12, "--render.importance", 4, "--workers", 0]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def start(city, out, *flags):
    """A running train.py that has trained some steps and has not saved a checkpoint."""
    script = Script("train.py", *SMALL, "--data-root", city, "--out", out, *flags, cwd=out.parent)
    log = out / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("train/loss") > 1, script)
    return script


def pretrain(city, out, *flags):
    """Run train.py in this process; two steps, unless `flags` say otherwise."""
    train.main(train.parse([*SMALL, "--data-root", city, "--out", out, "--steps", 2, *flags]))


@pytest.mark.parametrize(
    "signals, exit_code",
    [((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGHUP,), 129), ((signal.SIGINT, signal.SIGINT), 130)],
    ids=["SIGTERM twice", "SIGHUP", "Ctrl-C twice"],
)
def test_a_run_is_saved_when_all_its_processes_get_a_signal(signals, exit_code, city, tmp_path):
    """A terminal, systemd and Slurm signal the data loading processes too; here these get the signal first.

    Also: while it runs, its folder is locked.
    """
    script = start(city, tmp_path / "run", "--steps", 500, "--workers", 2)
    with pytest.raises(UserError, match=f"run is in use by another program .process {script.process.pid} on "):
        pretrain(city, tmp_path / "run")
    for number in signals:
        for process in (*children(script.process.pid), script.process.pid):
            os.kill(process, number)
    _, err = script.communicate(timeout=60)
    saved = checkpoint(tmp_path / "run")["step"]
    assert script.returncode == exit_code
    assert err.splitlines()[-1] == f"stopped after step {saved}, saved; resume with --resume {tmp_path / 'run'}"
    assert "Traceback" not in err and saved == max(curve(tmp_path / "run"))


def test_a_run_goes_on_after_a_data_loading_process_is_killed(city, tmp_path):
    script = start(city, tmp_path / "run", "--workers", 2, "--steps", 8)
    os.kill(children(script.process.pid)[0], signal.SIGKILL)
    _, err = script.communicate(timeout=60)
    assert script.returncode == 0, err
    assert "going on with --workers 1" in err and "Traceback" not in err
    pretrain(city, tmp_path / "undisturbed", "--steps", 8)
    assert_same_weights(tmp_path / "run", tmp_path / "undisturbed")


def test_unreadable_frames_of_all_processes_are_counted():
    """A frame that several processes met counts once."""
    code = """
from unipad.progress import Progress
from unipad.runtime import start

with start("cpu", deterministic=False) as world:
    progress = Progress(None, world, step=0, last=1, steps=1, batch_size=2)
    progress.report_unreadable(["file: is missing", f"file of process {world.rank}: is missing"])
    progress.sum_up()
"""
    assert "3 unreadable frames, named above, were replaced" in scripts.run_two("-c", code).stdout


class NeedsSharedMemory(torch.utils.data.Dataset):
    """Item i is i; in a worker process, items from the third on fail for lack of shared memory."""

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info() is not None and i > 1:
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left (28)")
        return i


def test_without_shared_memory_items_are_loaded_in_this_process(capsys):
    assert list(load_items(NeedsSharedMemory(), range(5), workers=2)) == list(range(5))
    words = "need more shared memory (/dev/shm; docker run --shm-size): going on with --workers 0"
    assert words in capsys.readouterr().err


def test_a_signal_ends_the_program_at_once_if_nothing_has_to_be_saved(capsys):
    """First outside of a training loop, then in one, after the step was saved and before its validation."""
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143 and capsys.readouterr().err == "stopped by SIGTERM\n"
    stop = StopOnSignal(ALONE)
    signal.raise_signal(signal.SIGINT)
    assert stop.asked(host_waits=False)
    with pytest.raises(Stopped), stop.at_once():
        raise AssertionError("a validation would begin")


def test_a_closed_pipe_stops_a_run_like_a_signal(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with exit_on_user_error():
            stop = StopOnSignal(ALONE)
            print("to a reader that has gone", flush=True)
            print("this one is discarded", flush=True)
    assert stop.number == SIGPIPE


def test_runs_started_in_the_same_second_get_different_folders(tmp_path):
    assert len({_new_folder(tmp_path) for _ in range(4)}) == 4


def test_a_finetuning_run_locks_its_eval_folder_against_other_programs(city, tmp_path, monkeypatch):
    """Another program tries to lock it during the validation."""
    code = "import sys, unipad.run_folder as f; f._locked(f.Path(sys.argv[1])).__enter__()"
    run, others = tmp_path / "run", []
    monkeypatch.setattr(finetune, "validate", lambda *_: others.append(scripts.run("-c", code, run / "eval")) or {})
    flags = ["--modality", "lidar", "--preset", "tiny", "--device", "cpu", "--workers", 0, "--steps", 1]
    finetune.main(finetune.parse([*flags, "--data-root", city, "--out", run]))
    assert f"eval is in use by another program (process {os.getpid()} on " in others[0].stderr
    assert not (run / "eval").exists()  # `validate` wrote nothing, so the folder was removed at the end


def test_under_torchrun_one_process_prints_the_error_and_torchruns_report_ends_with_it(tmp_path):
    """torchrun's own exit code is 1, whatever its processes exit with."""
    program = tmp_path / "program.py"
    program.write_text(
        "from unipad.errors import UserError\n"
        "from unipad.exit import exit_on_user_error\n"
        "with exit_on_user_error():\n"
        "    raise UserError('--flag is wrong; use another one.')\n"
    )
    done = scripts.run("-m", "torch.distributed.run", "--nproc-per-node", 2, program)
    sentence = "error: --flag is wrong; use another one."
    *_, last, _ = done.stderr.splitlines()  # the report ends in a line of "="
    assert done.returncode == 1 and done.stderr.startswith(sentence) and last == f"  traceback : {sentence}"
    # once by the main process, once in the report
    assert done.stderr.count(sentence) == 2 and "exitcode  : 2 " in done.stderr


@pytest.fixture
def without_boxes(city_copy):
    """Root of a dataset whose tables have no boxes, which the devkit refuses to score."""
    for name in ("sample_annotation", "instance"):
        (city_copy / "v1.0-mini" / f"{name}.json").write_text("[]")
    return city_copy


def test_a_failing_validation_loses_no_step(without_boxes, tmp_path):
    flags = ["--modality", "lidar", "--preset", "tiny", "--device", "cpu", "--workers", 0, "--save-every", 99]
    flags += ["--steps", 2, "--val-every", 1, "--data-root", without_boxes, "--out", tmp_path / "run"]
    for step in (1, 2):  # the first run trains step 1, the second resumes after the failure and trains step 2
        with pytest.raises(UserError, match=f"validation failed: the nuScenes devkit cannot .*step {step} is saved"):
            finetune.main(finetune.parse([*flags, "--resume", "auto"]))
        assert checkpoint(tmp_path / "run")["step"] == step
        assert (tmp_path / "run" / "checkpoints" / f"step_{step}.pt").exists()
    finetune.main(finetune.parse([*flags, "--resume", "auto"]))  # the run has ended: no step, no validation


def test_a_resumed_run_repeats_an_interrupted_validation(city, tmp_path, monkeypatch):
    def interrupted(*_):
        raise Stopped(signal.SIGTERM)

    flags = ["--val-every", 2, "--val-samples", 1, "--picture-stride", 16]
    validate = train.validate
    # its last argument is the step; the validation before training, at step 0, succeeds
    monkeypatch.setattr(train, "validate", lambda *args: {"depth_rmse": 1.0} if args[-1] == 0 else interrupted())
    with pytest.raises(Stopped):
        pretrain(city, tmp_path / "run", *flags)
    assert checkpoint(tmp_path / "run")["step"] == 2 and not curve(tmp_path / "run", "val/depth_rmse")
    monkeypatch.setattr(train, "validate", validate)
    pretrain(city, tmp_path / "run", *flags, "--resume", "auto")
    assert 2 in curve(tmp_path / "run", "val/depth_rmse")
    assert "after" in checkpoint(tmp_path / "run")["metrics"]  # the metrics after training


@pytest.fixture(scope="module")
def half_a_run(city, tmp_path_factory):
    """The folder of a run that was stopped after the first of two steps."""
    out = tmp_path_factory.mktemp("half") / "run"
    pretrain(city, out, "--stop-at", 1)
    return out


def without(*path):
    """A function that deletes saved[path[0]][path[1]]... of a checkpoint `saved`."""

    def apply(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved.pop(path[-1])

    return apply


def changed(change, *path):
    """A function that replaces saved[path[0]][path[1]]... of a checkpoint `saved` by `change` of that value."""

    def apply(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = change(saved[path[-1]])

    return apply


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda saved: saved.clear(), "it has no model"),
        (without("optimizer"), "it has no optimizer"),
        (without("step"), "it has no step"),
        (changed(lambda _: 9, "step"), "step 9 of 2"),
        (changed(lambda _: [1], "metrics"), "its metrics is a list"),
        (changed(lambda _: {"a": None}, "metrics"), "its metrics are no numbers"),
        (changed(lambda _: 7, "config"), "its config is a int"),
        (changed(lambda weights: dict(list(weights.items())[1:]), "model"), "its model does not fit .*1 are missing"),
        (changed(lambda weights: weights | dict.fromkeys(weights, 1.0), "model"), "its model does not fit"),
        (changed(lambda _: {}, "optimizer", "state"), "its optimizer does not fit .*no state"),
        (changed(lambda _: None, "optimizer", "state", 0), "its optimizer does not fit"),
        (changed(lambda _: torch.zeros(3), "optimizer", "state", 0, "exp_avg"), "has other shapes than the weights"),
        (changed(lambda mean: mean / 0, "optimizer", "state", 0, "exp_avg"), "its state has impossible values"),
        (changed(lambda _: torch.tensor(9.0), "optimizer", "state", 0, "step"), "its state is of step 9, the check"),
        (without("optimizer", "state", 3), "it has no state of some weights"),
        (changed(lambda _: [], "optimizer", "param_groups", 1, "params"), "it has other groups of weights"),
        (changed(lambda _: torch.zeros(2), "config", "args", "seed"), "is not the checkpoint of a training run"),
    ],
)
def test_a_damaged_checkpoint_is_not_resumed(damage, words, half_a_run, city, tmp_path):
    run = shutil.copytree(half_a_run, tmp_path / "run")
    saved = checkpoint(run)
    damage(saved)
    torch.save(saved, run / "checkpoints" / "last.pt")
    with pytest.raises(UserError, match=words) as error:
        pretrain(city, run, "--resume", "auto")
    assert "\n" not in str(error.value)


def test_a_run_whose_last_pt_is_no_checkpoint_is_not_started_over(half_a_run, city, tmp_path):
    run = shutil.copytree(half_a_run, tmp_path / "run")
    for value in (None, [], {}):
        torch.save(value, run / "checkpoints" / "last.pt")
        with pytest.raises(UserError, match="last.pt is not the checkpoint of a training run"):
            pretrain(city, run, "--resume", "auto")


def test_a_damaged_zip_record_of_a_checkpoint_is_named(half_a_run, tmp_path):
    """`torch.load` alone would return zeros for the weights without an error."""
    file = tmp_path / "last.pt"
    data = bytearray((half_a_run / "checkpoints" / "last.pt").read_bytes())
    with zipfile.ZipFile(half_a_run / "checkpoints" / "last.pt") as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    first = largest.header_offset + 1000  # in its data, after the header
    data[first : first + 64] = bytes(64)
    file.write_bytes(data)
    torch.load(file, weights_only=True)  # no error
    with pytest.raises(UserError, match=f"last.pt is damaged: its record {largest.filename} has another checksum"):
        read_checkpoint(file)


@contextmanager
def full_disk(size):
    """Stands in for a full disk: no file can become larger than `size` bytes; the error is "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_gives_a_one_sentence_error_and_keeps_the_last_checkpoint(half_a_run, city, tmp_path, capsys):
    run = shutil.copytree(half_a_run, tmp_path / "run")
    (run / "checkpoints" / ".last.pt.999999999").write_text("what a killed run left")
    # a checkpoint is larger than 200 kB
    with full_disk(200_000), pytest.raises(SystemExit) as end, exit_on_user_error():
        pretrain(city, run, "--resume", "auto")
    assert end.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {run}/checkpoints/last.pt: File too large; ")
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.pt"] and checkpoint(run)["step"] == 1


def test_an_incomplete_video_is_a_user_error(tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(240, 320, 3), dtype=np.uint8)).save(picture)
    with full_disk(20_000), pytest.raises(UserError, match="video.mp4 could not be written completely; make room"):
        write_video([picture] * 20, tmp_path / "video.mp4", fps=4)


def test_a_full_disk_gives_no_traceback_of_tensorboards_thread(tmp_path, capsys):
    run = RunFolder(tmp_path, {}, ALONE)
    with pytest.raises(SystemExit) as end, full_disk(2000), exit_on_user_error():
        for step in range(100):
            run.scalars({"loss": 1.0}, step)
        run.close()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and sentence.startswith("error: ") and "File too large" in sentence


@pytest.mark.parametrize("out, reason", [("x" * 300, "File name too long"), ("file/run", "Not a directory")])
def test_an_impossible_folder_gives_a_one_sentence_error(out, reason, city, tmp_path, capsys):
    (tmp_path / "file").touch()
    for program in (lambda: pretrain(city, tmp_path / out), lambda: generate(tmp_path / out, workers=1)):
        with pytest.raises(SystemExit) as end, exit_on_user_error():
            program()
        assert end.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert sentence.startswith(f"error: {tmp_path}") and reason in sentence


def test_partial_datasets_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".city.partial-999999999").mkdir()  # the suffix is a process id; no process has this one
    (tmp_path / f".city.partial-{os.getppid()}").mkdir()  # of a process that runs
    with pytest.raises(OSError), full_disk(100):  # the partial dataset of this call is removed too
        generate(tmp_path / "city", scenes=2, keyframes=2, image_size=(16, 16), workers=1, progress=False)
    assert [folder.name for folder in tmp_path.iterdir()] == [f".city.partial-{os.getppid()}"]


def test_a_run_resumes_after_its_dataset_has_moved(half_a_run, city, city_copy, tmp_path, monkeypatch):
    run = shutil.copytree(half_a_run, tmp_path / "run")
    for table in (city_copy / "v1.0-mini").iterdir():
        os.utime(table)  # copied or unpacked tables have other modification times
    with monkeypatch.context() as patch:
        patch.setattr(NuScenesDataset, "contents", lambda self: "digest of other frames")
        with pytest.raises(UserError, match="was trained on other frames than .* has; give the folder of"):
            pretrain(city_copy, run, "--resume", "auto")
    pretrain(city_copy, run, "--resume", "auto")
    assert json.loads((run / "config.json").read_text())["args"]["data_root"] == str(city_copy)


def test_contents_are_equal_for_a_copied_dataset_and_differ_between_splits_and_frames(city, city_copy):
    """The digest by which a resumed run checks that its frames are the same: of another split, or without one frame, it
    differs."""
    data = PRETRAIN["lidar"]["tiny"].data

    def contents(root, split="mini_train"):
        return NuScenesDataset(root, "v1.0-mini", split, data).contents()

    assert contents(city) == contents(city_copy) != contents(city, "mini_val")
    before = contents(city_copy)
    index = NuScenesDataset(city_copy, "v1.0-mini", "mini_train", data).index
    (city_copy / index.lidar_files[index.frame_lidar[0]].decode()).unlink()
    assert contents(city_copy) != before


def test_init_chooses_the_newest_run_and_a_resumed_run_keeps_that_choice(half_a_run, city, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(half_a_run, runs / "first")
    flags = ["--init", runs, "--stop-at", 1]
    pretrain(city, tmp_path / "run", *flags)
    file = str(runs / "first" / "checkpoints" / "last.pt")
    assert checkpoint(tmp_path / "run")["config"]["args"]["init"] == [file]
    shutil.copytree(half_a_run, runs / "second")
    os.utime(runs / "second" / "checkpoints" / "last.pt")  # now the newest
    pretrain(city, tmp_path / "run", *flags, "--resume", "auto")
    assert checkpoint(tmp_path / "run")["config"]["args"]["init"] == [file]
    with pytest.raises(UserError, match="was started with --init"):
        pretrain(city, tmp_path / "run", "--init", runs / "second", "--resume", "auto")


def test_invalid_lines_and_later_steps_are_dropped_from_a_log(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    # two valid lines to keep, four invalid ones, the last of them half-written, and step 3, which is after step 2
    log.write_bytes(b'{"step": 1}\n\xff\xfe{"step"\n[3]\n{"step": "x"}\n{"step": 3}\n{"command": []}\n{"st')
    _drop_records_after(2, log)
    assert log.read_bytes() == b'{"step": 1}\n{"command": []}\n'
    assert f"{log}: removed 4 damaged lines." in capsys.readouterr().err
