"""Kill or disturb small runs at random moments, and check that they lose no more steps than the README says.

    python -m tests.accidents --moments 20 --seed 0             # a line each, then a summary; exit code 1 after a fault
    python -m tests.accidents --moments 9 --only "full disk"    # one kind of accident
    python -m tests.accidents --moment 12                       # the moment of number 12 only, with the run's stderr

Each moment (one trial) starts train.py or finetune.py, with a data loading process and without a cached index, and
waits until it has used a random part of the CPU time of an undisturbed run. It may then be at the imports, the indexing
of the dataset, a step, the writing of a checkpoint or a validation. Then one of `ACCIDENTS` happens. The run must end
with the exit code that the README promises and a last line that fits it, without a traceback, and leave neither partial
files (kill -9 may: the resumed run removes them) nor data loading processes. Its last checkpoint must be intact and
recent enough. With `--resume auto` it must reach the end, and all numbers in the log, but speed and memory, and all
weights must equal those of the undisturbed run.

Linux only. The full disk is a tmpfs where this user may mount one, otherwise a limit on the size of files.
"""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests import scripts
from unipad.checkpoint import read_training
from unipad.data.synthetic import generate
from unipad.errors import UserError

STEPS, SAVE_EVERY, VAL_EVERY = 8, 2, 3  # steps; a checkpoint is also saved before each validation
FLAGS = ["--modality", "lidar", "--preset", "tiny", "--device", "cpu", "--workers", 1, "--log-every", 1]
FLAGS += ["--steps", STEPS, "--save-every", SAVE_EVERY, "--val-every", VAL_EVERY]
RAYS = ["--rays.per-view", 8, "--render.samples", 12, "--render.importance", 4, "--val-samples", 1]
PROGRAMS = {"train.py": [*FLAGS, *RAYS, "--picture-stride", 16], "finetune.py": FLAGS}

# pattern of the last line on stderr of a stopped run: after a training step, or elsewhere
STOPPED = r"stopped after step \d+, saved; resume with --resume \S+|stopped by SIG\w+"
# accident -> (exit code of the run, pattern of its last line on stderr)
ACCIDENTS = {
    "kill -9": (-signal.SIGKILL, None),
    "SIGTERM": (128 + signal.SIGTERM, STOPPED),
    "SIGHUP": (128 + signal.SIGHUP, STOPPED),
    "Ctrl-C": (128 + signal.SIGINT, STOPPED),
    "closed pipe": (128 + signal.SIGPIPE, STOPPED),
    "full disk": (2, r"error: .*(No space left on device|File too large); .*"),
    "worker killed": (0, None),
}
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP, "Ctrl-C": signal.SIGINT}
TRACES = ("Traceback", "Exception ignored", "Error in ")  # how Python's reports of uncaught exceptions begin
PARTIAL = re.compile(r"^\..*\.\d+$|\.partial-|\.part$")  # names of files and folders that are being written
SECONDS = 300  # time limit of a run
DISK = 48 * 2**20  # bytes of the tmpfs; an undisturbed run needs half of that


@dataclass
class Moment:
    """An accident, and its outcome."""

    program: str
    accident: str
    seconds: float  # of CPU time that the run has used when the accident happens
    phase: str = ""  # what the run was doing then: `phase_of`
    code: int = 0  # as of `Popen.returncode`
    stderr: str = ""
    logged: int = 0  # last step in the log
    saved: int = 0  # step of the last checkpoint
    faults: list[str] = field(default_factory=list)

    @property
    def last_line(self):
        return (self.stderr.splitlines() or [""])[-1]


def log_of(run: Path) -> dict[int, dict]:
    """step -> {name: number} of the log in a run's folder, without speed and memory."""
    steps = defaultdict(dict)
    file = run / "log.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):  # the last line may be half-written
            values = json.loads(line)
            if "step" in values:
                steps[values["step"]] |= {k: v for k, v in values.items() if not k.endswith(("_per_s", "_mb"))}
    return steps


def last_logged(run: Path) -> int:
    """The last training step in the log; 0 without one."""
    return max((step for step, values in log_of(run).items() if "train/loss" in values), default=0)


def phase_of(run: Path) -> str:
    """What a run is doing, as far as its files say."""
    if not (run / "config.json").exists():
        return "dataset" if run.exists() else "imports"
    log, step = log_of(run), last_logged(run)
    validates = step and (step % VAL_EVERY == 0 or step == STEPS) and not any("val/" in name for name in log[step])
    return f"validation {step}" if validates else f"step {step + 1}"


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, without its children; works for a zombie (ended, not waited for) too."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, values[11:13])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def ended(pid: int) -> bool:
    """Whether a child process has ended; it stays a zombie."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:  # it has ended
        return []


def loaders_of(pid: int) -> list[int]:
    """Process ids of the data loading processes of a program: forked, so they have its command line."""
    return [child for child in children(pid) if b"--workers" in Path(f"/proc/{child}/cmdline").read_bytes()]


@contextmanager
def disk(folder: Path):
    """A new folder, removed afterwards; a disk of its own where this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder)


def fill(folder: Path, pid: int, left: int):
    """Fill the disk at `folder` except for `left` bytes; if `folder` is no disk, limit each file of process `pid` to
    `left` bytes.
    """
    if not folder.is_mount():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        return
    with (folder / "filler").open("wb") as file:
        size = max(0, shutil.disk_usage(folder).free - left)
        os.posix_fallocate(file.fileno(), 0, max(1, size))


class Harness:
    """A small city, and an undisturbed run of each program on it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.city = generate(folder / "city", scenes=2, keyframes=3, image_size=(72, 128), workers=1, progress=False)
        self.expected, self.seconds = {}, {}
        for program in PROGRAMS:
            with self._sandbox() as sandbox:
                process = self._start(program, sandbox)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                self.seconds[program] = cpu_seconds(process.pid)
                _, err = process.communicate()
                assert process.returncode == 0, err.decode()
                self.expected[program] = self._results(sandbox / "run")

    @contextmanager
    def _sandbox(self):
        """A new folder for a run, with the city, but without the city's cached index."""
        with disk(self.folder / "disk") as sandbox:
            (sandbox / "city").mkdir()
            for part in self.city.iterdir():
                if part.name.startswith("v1.0"):  # the tables
                    shutil.copytree(part, sandbox / "city" / part.name)
                elif part.name != "unipad-index":
                    (sandbox / "city" / part.name).symlink_to(part)
            yield sandbox

    def _flags(self, program, sandbox):
        """For the first start as well as for the resumption: `--resume auto` starts anew where nothing is saved."""
        flags = [*PROGRAMS[program], "--data-root", sandbox / "city", "--out", sandbox / "run", "--resume", "auto"]
        return list(map(str, flags))

    def _start(self, program, sandbox):
        command = [sys.executable, str(scripts.REPO / program), *self._flags(program, sandbox)]
        environment = scripts.environment() | {"XDG_CACHE_HOME": str(sandbox / "cache")}
        return subprocess.Popen(
            command,
            cwd=sandbox,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where this runs under nohup
        )

    def _results(self, run):
        """`log_of` a finished run, and its weights by name."""
        weights = read_training(run / "checkpoints" / "last.pt")["model"]
        return log_of(run), {name: weight.clone() for name, weight in weights.items()}

    def moment(self, seed: int, number: int, only: str | None) -> Moment:
        """Run a program, disturb it, check it, resume it: `seed` and `number` determine program, accident and time.

        only: this accident instead.
        """
        rng = np.random.default_rng([seed, number])
        program = "finetune.py" if number % 3 == 2 else "train.py"
        accident = only or list(ACCIDENTS)[number % len(ACCIDENTS)]
        moment = Moment(program, accident, rng.uniform(0, 0.95 * self.seconds[program]))
        with self._sandbox() as sandbox:
            process = self._start(program, sandbox)
            while cpu_seconds(process.pid) < moment.seconds and not ended(process.pid):
                time.sleep(0.002)
            moment.phase = phase_of(sandbox / "run") if process.poll() is None else "end"
            loaders = self._inject(accident, process, sandbox, left=int(rng.integers(2**22)))
            try:
                _, err = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                _, err = process.communicate()
                moment.faults.append("did not end")
            moment.code, moment.stderr = process.returncode, err.decode()
            self._check(moment, sandbox, loaders)
            self._resume(moment, sandbox)
        return moment

    def _inject(self, accident, process, sandbox, left):
        """Cause the accident; returns the process ids of the run's data loading processes.

        left: bytes, for `fill`.
        """
        loaders = loaders_of(process.pid)
        if accident in SIGNALS:
            # all processes get the signal, as from a terminal, systemd or Slurm; kill -9 only the main process
            for pid in loaders if accident != "kill -9" else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGNALS[accident])
            process.send_signal(SIGNALS[accident])
        elif accident == "closed pipe":
            process.stdout.close()
        elif accident == "full disk":
            with suppress(ProcessLookupError):
                fill(sandbox, process.pid, left)
        while accident == "worker killed" and process.poll() is None:
            if loaders := loaders_of(process.pid):  # there may be none yet
                os.kill(loaders[0], signal.SIGKILL)
                break
            time.sleep(0.01)
        return loaders

    def _check(self, moment, sandbox, loaders):
        """Collect the faults of a run that has ended."""
        run, faults = sandbox / "run", moment.faults
        (sandbox / "filler").unlink(missing_ok=True)
        code, pattern = ACCIDENTS[moment.accident]
        # the accident came after the last step: then 0 is no fault, nor is -N (in a shell: 128 + N), which `subprocess`
        # returns for a process killed by signal N, as Python is while it shuts down
        finished = last_logged(run) == STEPS and moment.code in (0, -SIGNALS.get(moment.accident, 0))
        if moment.code != code and not finished:
            faults.append(f"exit code {moment.code} instead of {code}")
        if pattern and not finished and not re.fullmatch(pattern, moment.last_line):
            faults.append(f"last line {moment.last_line!r}")
        faults += [f"prints {words!r}" for words in TRACES if words in moment.stderr]
        moment.logged = last_logged(run)
        if (file := run / "checkpoints" / "last.pt").exists():
            try:
                moment.saved = read_training(file)["step"]
            except UserError as error:
                faults.append(str(error))
        cannot_save = moment.accident in ("kill -9", "full disk")  # others save when they stop
        may_lose = SAVE_EVERY if cannot_save else 0  # steps
        if moment.saved < moment.logged - may_lose:
            faults.append(f"step {moment.logged} is logged, but only step {moment.saved} is saved")
        if moment.accident != "kill -9":
            faults += [f"leaves {part}" for part in self._partial(sandbox)]
        end = time.monotonic() + 20  # seconds; PyTorch's workers check every few seconds whether their parent is alive
        while alive := [pid for pid in loaders if Path(f"/proc/{pid}").exists()]:
            if time.monotonic() > end:
                faults.append(f"leaves processes {alive}")
                break
            time.sleep(0.1)

    def _resume(self, moment, sandbox):
        """Resume the run to its end, and collect the faults of its results."""
        program, faults = moment.program, moment.faults
        done = scripts.run(program, *self._flags(program, sandbox), cwd=sandbox, timeout=SECONDS)
        if done.returncode or "Traceback" in done.stderr:
            faults.append(f"resumed: exit code {done.returncode}, {done.stderr[-500:]}")
            return
        (log, weights), (expected_log, expected_weights) = self._results(sandbox / "run"), self.expected[program]
        for step in sorted(log.keys() | expected_log.keys()):
            if log[step] != expected_log[step]:
                faults.append(f"resumed: log of step {step} is {log[step]} instead of {expected_log[step]}")
        different = [name for name, weight in expected_weights.items() if not torch.equal(weights[name], weight)]
        faults += [f"resumed: {len(different)} weights differ, first {different[0]}"] if different else []
        faults += [f"resumed: leaves {part}" for part in self._partial(sandbox)]

    def _partial(self, sandbox):
        """Files and folders that were left half-written."""
        return [str(path.relative_to(sandbox)) for path in sandbox.rglob("*") if PARTIAL.search(path.name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="number of moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ACCIDENTS, help="this kind of accident only")
    parser.add_argument("--moment", type=int, help="the moment of this number only, with the run's stderr")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder))
        for number in range(args.moments) if args.moment is None else [args.moment]:
            moment = harness.moment(args.seed, number, args.only)
            table[moment.accident].append(moment)
            words = f"{number:>3}  {moment.program:<12}{moment.accident:<14}{moment.seconds:5.1f} s  {moment.phase:<13}"
            words += f"exit {moment.code:<4} logged {moment.logged} saved {moment.saved}  {moment.last_line[:60]}"
            print("\n      ".join([words, *moment.faults]), flush=True)
            if args.moment is not None:
                print(moment.stderr)
    print(f"\n{'accident':<14}{'moments':>8}{'faulty':>8}{'steps lost, at most':>21}  exit codes")
    for accident, moments in table.items():
        faulty, lost = sum(bool(m.faults) for m in moments), max(m.logged - m.saved for m in moments)
        codes = ", ".join(map(str, sorted({m.code for m in moments})))
        print(f"{accident:<14}{len(moments):>8}{faulty:>8}{lost:>21}  {codes}")
    sys.exit(any(moment.faults for moments in table.values() for moment in moments))


if __name__ == "__main__":
    main()
