"""Autotuning: the candidate launches of an op are timed once per kind of work; the fastest is saved in a file.

A candidate is a tuple of launch parameters, such as block sizes. Its time includes preparing what only this candidate
reads, such as the tiles of its size in the neighbor table (sparse_tiles.py), since every training step prepares them
again; tiles that an earlier layer has already built are not counted. Runs are timed as in a training step: back to
back, with the L2 cache as the previous run leaves it and the host ahead of the device. The lowest median wins.

Until `enable` is called, tuning is off: every op uses the first of its candidates, a sensible default. Candidates may
sum in different orders, so results are bitwise equal only between runs with the same choices: tuning off, or the same
file. Under `torch.use_deterministic_algorithms(True)` nothing is timed, so that timing cannot change results; choices
made before, or in the file, still hold.
"""

import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from unipad.kernels.backend import capturing, host_wait, strictly_deterministic, triton


@dataclass
class _State:
    on: bool = False
    path: Path | None = None
    timer: Callable | None = None
    known: dict = field(default_factory=dict)  # the file: name of device -> kind of work -> fastest candidate, a list
    chosen: dict = field(default_factory=dict)  # in this process: (device, *kind of work) -> candidate


_state = _State()


def enable(path: str | Path | None = None, timer: Callable[[Callable], float] | None = None):
    """Time candidates from now on.

    Args:
        path:  JSON file of results, read now and written after every search, e.g. in the run's folder; None: not saved.
               Concurrent processes overwrite each other's results; the file stays valid. Raises ValueError for a file
               of another content.
        timer: takes a function, returns its time in ms; None: CUDA events, and no search without a GPU.
    """
    global _state
    path = None if path is None else Path(path)
    known = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(of_device, dict) for of_device in known.values()):
        raise ValueError(f"{path} is not a file of tuning results")
    _state = _State(True, path, timer, known)


def disable():
    """Use the first of an op's candidates from now on."""
    global _state
    _state = _State()


def bucket(n):
    """n rounded up to a power of two, so that a slightly different number of voxels needs no new search."""
    return 1 << max(n - 1, 0).bit_length()


def choose(kind, candidates, run, device):
    """The fastest of the candidates; the first where tuning is off or nothing can be timed.

    Args:
        kind:       tuple that identifies the work: op, types, sizes; `bucket` rounds its last entry, a size.
        candidates: tuples; the first is the default.
        run:        takes a candidate and does the work, including what only this candidate needs; called many times
                    per candidate, and must not make later calls cheaper, e.g. by caching.
        device:     `torch.device` of the tensors.
    """
    if not _state.on or len(candidates) == 1:
        return candidates[0]
    work = device, *kind[:-1], bucket(kind[-1])
    if _state.chosen.get(work) not in candidates:  # None, or chosen among other candidates
        fastest = _look_up(work, candidates) or _search(work, candidates, run)
        if fastest is None:
            return candidates[0]
        _state.chosen[work] = fastest
    return _state.chosen[work]


def _look_up(work, candidates):
    """The candidate that the file names for the work; None if there is none or it is no longer a candidate."""
    results, key = _results_on_device(work)
    return next((c for c in candidates if list(c) == results.get(key)), None)


def _search(work, candidates, run):
    """The fastest candidate, which is also saved; None where timing is not possible or not allowed."""
    device = work[0]
    can_time = _state.timer is not None or device.type == "cuda"
    if not can_time or capturing(device) or strictly_deterministic():
        return None
    times = [_time(lambda c=c: run(c), device) for c in candidates]
    fastest = candidates[times.index(min(times))]
    results, key = _results_on_device(work)
    results[key] = list(fastest)
    _save()
    return fastest


def _results_on_device(work):
    """The file's part for the work's device, and the key of the work in it."""
    device, *kind = work
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _state.known.setdefault(name, {}), " ".join(map(str, kind))


RUNS = 21  # timed runs of each candidate
SPIN = 2**22  # clock cycles that the device waits, 2 to 3 ms at 1.4 to 2 GHz: the host launches all runs meanwhile


def _time(fn, device):
    try:
        return _state.timer(fn) if _state.timer is not None else _milliseconds(fn, device)
    except triton.runtime.errors.OutOfResources:  # more shared memory than this GPU has
        return math.inf


def _milliseconds(fn, device):
    """Median of `RUNS` back-to-back runs, in ms, with CUDA events."""
    with torch.cuda.device(device), host_wait("timing of a launch"):
        fn()  # compiles
        torch.cuda._sleep(SPIN)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
        events[0].record()
        for event in events[1:]:
            fn()
            event.record()
        events[-1].synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairwise(events))


def _save():
    if _state.path is not None:
        _state.path.parent.mkdir(parents=True, exist_ok=True)
        # a random name, not the process id: a process on another machine may have the same id
        new = _state.path.with_name(f"{_state.path.name}.{uuid.uuid4().hex}")
        new.write_text(json.dumps(_state.known, indent=1, sort_keys=True))
        new.replace(_state.path)
