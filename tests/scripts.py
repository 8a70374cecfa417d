"""Run Python programs in separate processes, as a user does, but forked from a server that has imported their modules.

Imports take ten seconds of CPU time, and the test suite starts programs fifty times. The server computes nothing before
it forks, so the processes inherit no OpenMP threads.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

REPO = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train", "finetune", "eval", "unipad.convert", "nuscenes.eval.detection.evaluate", "tests.ahead_of_time"]
)


def environment():
    """The environment without TRITON_INTERPRET: on a CPU, programs then use the reference ops instead of kernels."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return clean | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


class Script:
    """A running program, with the methods of `subprocess.Popen` that tests use.

    args:      what follows `python`: a script of this repository, "-m" and a module, or "-c" and code; then its flags
    cwd:       the program's working folder
    path:      an additional folder to import from
    variables: environment variables to set
    """

    def __init__(self, *args, cwd=REPO, path="", variables=None):
        self.args = list(map(str, args))
        self.folder = tempfile.TemporaryDirectory()  # removed with this object
        self.output = Path(self.folder.name)
        with mock.patch.dict(os.environ, environment(), clear=True):  # the programs inherit the server's environment
            forkserver.ensure_running()
        self.process = SERVER.Process(target=_run, args=(self.args, str(cwd), str(path), variables, self.output))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        self.process.join(0)
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=None):
        """Waits for the program; unlike that of `Popen`, kills it after `timeout` seconds."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        """Waits for the program; returns what it printed to stdout and to stderr."""
        self.wait(timeout)
        return tuple((self.output / name).read_text() for name in ("stdout", "stderr"))


def run(*args, cwd=REPO, path="", timeout=300):
    """Run a program until it exits, like `subprocess.run`."""
    script = Script(*args, cwd=cwd, path=path)
    out, err = script.communicate(timeout)
    return subprocess.CompletedProcess(script.args, script.returncode, out, err)


def run_two(*args, cwd=REPO, timeout=300):
    """Run a program in two processes, as torchrun does; returns when both have exited, with the outputs of both joined.
    The exit code is 0 if that of both is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting_point = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [meeting_point | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    main, other = (Script(*args, cwd=cwd, variables=variables) for variables in ranks)
    out, err = main.communicate(timeout)
    other_out, other_err = other.communicate(timeout)
    return subprocess.CompletedProcess(main.args, main.returncode or other.returncode, out + other_out, err + other_err)


def _run(args, cwd, path, variables, output):
    """Become the program, in a process forked from the server; output: folder for the files stdout and stderr."""
    os.environ.update(variables or {})
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
    os.chdir(cwd)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
    multiprocessing.set_start_method("fork", force=True)  # the default on Linux, unlike in a child of a forkserver
    sys.path[0] = str(REPO)
    sys.path.append(path)
    first, *rest = args
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(REPO / first), *rest]
        runpy.run_path(sys.argv[0], run_name="__main__")
