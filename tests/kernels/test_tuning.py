import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from unipad.kernels import tuning

CPU = torch.device("cpu")
CANDIDATES = [(64, 4), (128, 4), (128, 8)]  # as (block size, warps); the first is the default


class Clock:
    """A timer, which looks up in `times` how long a candidate takes; its method `run` is the work that is timed.

    `run` records in `ran` which candidates ran. A clock without times raises if it has to time anything.
    """

    def __init__(self, times):
        self.times, self.ran = times, []

    def run(self, candidate):
        self.ran.append(candidate)

    def __call__(self, fn):
        fn()
        return self.times[self.ran[-1]]


@pytest.fixture(autouse=True)
def tuning_off_afterwards():
    yield
    tuning.disable()


def choose(clock, n=1000, candidates=CANDIDATES):
    """The candidate chosen for n voxels; the work is `clock.run`, times come from the timer of `tuning.enable`."""
    return tuning.choose(("op", torch.bfloat16, n), candidates, clock.run, CPU)


def test_without_tuning_the_default_is_used_and_nothing_runs():
    clock = Clock({})
    assert choose(clock) == (64, 4)
    tuning.enable(timer=Clock(dict.fromkeys(CANDIDATES, 1.0)))
    tuning.disable()
    assert choose(clock) == (64, 4) and not clock.ran


def test_without_gpu_or_timer_the_default_is_used():
    tuning.enable()
    clock = Clock({})
    assert choose(clock) == (64, 4) and not clock.ran


def test_candidates_are_timed_once_for_each_kind_of_work():
    clock = Clock({(64, 4): 3.0, (128, 4): 1.0, (128, 8): 2.0})
    tuning.enable(timer=clock)
    assert choose(clock) == (128, 4) and clock.ran == CANDIDATES
    assert choose(clock, n=513) == choose(clock, n=1024) == (128, 4) and len(clock.ran) == 3  # the bucket of 1000
    clock.times[64, 4] = 0.5
    assert choose(clock, n=1025) == (64, 4) and len(clock.ran) == 6  # another bucket: timed again


def test_choices_are_saved_in_a_file(tmp_path):
    path = tmp_path / "run" / "tuning.json"
    clock = Clock({(64, 4): 3.0, (128, 4): 2.0, (128, 8): 1.0})
    tuning.enable(path, clock)
    assert choose(clock) == (128, 8)
    assert json.loads(path.read_text()) == {"cpu": {"op torch.bfloat16 1024": [128, 8]}}
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left

    tuning.enable(path, Clock({}))  # the choice comes from the file
    assert choose(clock) == (128, 8) and len(clock.ran) == 3
    tuning.enable(path, clock)
    assert choose(clock, candidates=CANDIDATES[:2]) == (128, 4)  # (128, 8) is no longer a candidate: searched again


@pytest.mark.parametrize("n, expected", [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_sizes_are_rounded_up_to_powers_of_two(n, expected):
    assert tuning.bucket(n) == expected


def test_candidates_beyond_shared_memory_are_skipped():
    triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    clock = Clock(dict.fromkeys(CANDIDATES, 1.0))

    def run(candidate):
        clock.run(candidate)
        if candidate == (64, 4):
            raise triton.runtime.errors.OutOfResources(300000, 200000, "shared memory")  # bytes needed, available

    tuning.enable(timer=clock)
    assert tuning.choose(("op", 5), CANDIDATES, run, CPU) == (128, 4)


def test_nothing_is_timed_under_strict_determinism(tmp_path):
    clock = Clock({(64, 4): 3.0, (128, 4): 1.0, (128, 8): 2.0})
    path = tmp_path / "tuning.json"
    tuning.enable(path, clock)
    torch.use_deterministic_algorithms(True)  # strict: fixture `poisoned_memory` sets it with warn_only, and ends it
    assert choose(clock) == (64, 4) and not clock.ran
    torch.use_deterministic_algorithms(False)
    assert choose(clock) == (128, 4)
    torch.use_deterministic_algorithms(True)
    tuning.enable(path, Clock({}))
    assert choose(clock) == (128, 4) and len(clock.ran) == 3  # from the file


def test_two_saves_with_the_same_pid_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    """Processes of two machines may have the same pid; here one process saves twice."""
    path, temporary = tmp_path / "tuning.json", set()
    monkeypatch.setattr("os.getpid", lambda: 1)
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda file, target: (temporary.add(file), replace(file, target))[1])
    for _ in range(2):
        path.unlink(missing_ok=True)  # so that it searches and saves again
        clock = Clock(dict.fromkeys(CANDIDATES, 1.0))
        tuning.enable(path, clock)
        choose(clock)
    assert len(temporary) == 2


def test_runs_are_timed_back_to_back_by_their_median(monkeypatch):
    """With a simulated clock: the first run, which compiles, is not timed; the host is ahead of the device; no cache
    is flushed between runs; and an outlier does not matter."""
    now, log = [0.0], []  # ms; what happens, in order

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = now[0]

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    def fn():
        log.append("run")
        now[0] += 50.0 if log.count("run") in (1, 7) else 2.0  # slow: the first run, which compiles, and one outlier

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: log.append("spin"))
    assert tuning._milliseconds(fn, torch.device("cuda")) == 2.0
    assert log == ["run", "spin", "event"] + ["run", "event"] * tuning.RUNS + ["wait"]
