"""What ends a run from outside, or tries to: nothing is lost that the README does not say, and one line tells it."""

import os
import signal

import pytest

import train
from tests.scripts import Script
from tests.test_train import assert_same_weights, checkpoint, curve, wait_for

SMALL = ["--modality", "lidar", "--preset", "tiny", "--device", "cpu", "--rays.per-view", 8, "--val-every", 0]
SMALL += ["--log-every", 1, "--save-every", 500, "--render.samples", 12, "--render.importance", 4, "--steps", 500]


def start(city, out, *flags):
    """train.py, once it has trained some steps, none of which it saves by itself."""
    script = Script("train.py", *SMALL, "--data-root", city, "--out", out, *flags, cwd=out.parent)
    log = out / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("train/loss") > 1, script)
    return script


def children(process):
    return [int(pid) for pid in open(f"/proc/{process}/task/{process}/children").read().split()]


@pytest.mark.parametrize(
    "numbers, code",
    [((signal.SIGTERM,), 143), ((signal.SIGHUP,), 129), ((signal.SIGINT, signal.SIGINT, signal.SIGTERM), 130)],
    ids=["SIGTERM", "SIGHUP", "Ctrl-C twice"],
)
def test_a_signal_to_all_processes_saves(numbers, code, city, tmp_path):
    """As of a terminal, of systemd and of Slurm: the loading processes get it first."""
    script = start(city, tmp_path / "run", "--workers", 2)
    for number in numbers:
        for process in (*children(script.process.pid), script.process.pid):
            os.kill(process, number)
    _, err = script.communicate(timeout=60)
    saved = checkpoint(tmp_path / "run")["step"]
    assert script.returncode == code
    assert err.splitlines()[-1:] == [f"stopped after step {saved}, saved; resume with --resume {tmp_path / 'run'}"]
    assert "Traceback" not in err and saved == max(curve(tmp_path / "run"))


def test_a_killed_loading_process_is_replaced(city, tmp_path):
    script = start(city, tmp_path / "run", "--workers", 2, "--steps", 6)
    os.kill(children(script.process.pid)[0], signal.SIGKILL)
    _, err = script.communicate(timeout=60)
    assert script.returncode == 0, err
    assert "going on with --workers 1" in err and "Traceback" not in err
    train.main(train.parse([*SMALL, "--data-root", city, "--out", tmp_path / "one", "--steps", 6, "--workers", 0]))
    assert_same_weights(tmp_path / "run", tmp_path / "one")
