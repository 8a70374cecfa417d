"""Where a program runs: settings of the device, and waits of processes for each other."""

import contextlib
import threading

import pytest
import torch
import torch.distributed as dist

from tests import scripts
from unipad import runtime
from unipad.errors import UserError
from unipad.runtime import Waits, World, start


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_times_its_algorithms_unless_runs_must_be_reproducible(deterministic, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    try:
        with start("cuda", deterministic):
            assert torch.backends.cudnn.benchmark == (not deterministic)
    finally:
        torch.use_deterministic_algorithms(False)


def arrive_last(store, arrived, finished):
    """Process 1 of two: meets process 0, which waits for it."""
    waits = Waits(store, 1, 2)
    assert arrived.wait(60) and not finished.is_set()
    waits.meet()
    waits.close(None)


def test_a_process_waits_until_all_have_come():
    store, arrived, finished = dist.HashStore(), threading.Event(), threading.Event()
    waits = Waits(store, 0, 2)
    thread = threading.Thread(target=arrive_last, args=(store, arrived, finished), daemon=True)
    thread.start()
    plain = waits.store.check
    # it looks whether a process has failed only after it has seen that one is missing
    waits.store = type("Store", (), {"add": store.add, "check": lambda _, keys: (arrived.set(), plain(keys))[1]})()
    waits.meet()
    finished.set()
    thread.join()
    assert arrived.is_set()
    waits.close(None)


class Clock:
    """Advances by 100 seconds, and calls `then` with the number of looks so far, whenever it is looked at."""

    def __init__(self, then):
        self.looks, self.then = 0, then

    def __call__(self):
        self.looks += 1
        self.then(self.looks)
        return 100.0 * self.looks


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(runtime, "POLL", 0)


def test_a_wait_lasts_as_long_as_the_others_live(no_pauses):
    """Here 10,000 seconds, at the end of which process 1 arrives."""
    store = dist.HashStore()
    clock = Clock(lambda looks: store.add("arrived 1" if looks == 100 else "alive 1", 1))
    waits = Waits(store, 0, 2, clock)
    waits.meet()
    assert clock.looks >= 100
    waits.close(None)


def test_a_wait_for_a_silent_process_ends(no_pauses):
    """Process 1 lives for 1000 seconds; process 0 gives up when it has heard nothing of it for more than `SILENCE`."""
    store = dist.HashStore()
    clock = Clock(lambda looks: store.add("alive 1", 1) if looks <= 10 else None)
    waits = Waits(store, 0, 2, clock)
    with pytest.raises(UserError, match="waited for process 1, which has given no sign of life for 600 seconds"):
        waits.meet()
    assert 10 + runtime.SILENCE // 100 <= clock.looks < 30
    waits.close(None)


def test_waits_of_an_earlier_start_are_not_found(monkeypatch):
    """torchrun's store, with all keys in it, outlives the processes that it restarts."""
    store = dist.HashStore()
    monkeypatch.setattr(runtime, "_broadcast", lambda value, world: value)
    for _ in range(2):
        with contextlib.suppress(ZeroDivisionError), runtime._waiting(store, World(0, 2, torch.device("cpu"))):
            assert runtime._waits.store.add("arrived 1", 1) == 1
            runtime.meet()
            assert not runtime._waits.store.check(["failed"])
            raise ZeroDivisionError  # leaves without the last wait
    assert runtime._waits is None


ENDS = """
import os, signal, sys
from unipad.errors import UserError
from unipad.exit import exit_on_user_error
from unipad.runtime import meet, on_main, start
which, how = sys.argv[1:]
with exit_on_user_error(), start("cpu", deterministic=False) as world:
    assert on_main(lambda: "made", world) == "made"
    meet()
    if world.rank == int(which):
        if how == "raise":
            raise UserError("its disk is full.")
        if how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)
    meet()
"""


@pytest.mark.parametrize(
    "which, how, sentence",
    [
        (1, "raise", "error: process 0 waited, but process 1 has ended: its disk is full."),
        (1, "signal", "error: process 0 waited, but process 1 has ended: Stopped"),
        (
            0,
            "exit",
            "error: process 1 waited for the others, but the main process (or torchrun on the first machine)",
        ),
    ],
)
def test_a_process_that_ends_ends_the_wait_of_the_other(which, how, sentence):
    """By an error, which the other one repeats; by a signal; or at once, as by `kill -9`, and with it the store."""
    done = scripts.run_two("-c", ENDS, which, how)
    assert done.returncode and sentence in done.stderr, done.stderr
