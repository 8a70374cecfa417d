"""How a program ends: an exit code, and one line on stderr instead of a traceback.

This module does not import torch, so that the scripts can call `end_at_once` before their slow imports.

    2          a user's error, a damaged file, a full disk, too little memory
    128 + N    signal N: Ctrl-C (130), SIGTERM (143), SIGHUP (129), or a closed output pipe, as after `| head` (141)

Under torchrun every process ends this way, but only the main one prints; torchrun's own report repeats the sentence.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from unipad.errors import UserError

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SIGPIPE = 13  # Windows has no `signal.SIGPIPE`

# System errors that a user can fix, with the fix; any other is a bug of this program and gets a traceback
FIXES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder or file that you may use, or ask for the permission",
    errno.EPERM: "choose a folder or file that you may use, or ask for the permission",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle; repair them",
    errno.ENOTDIR: "a part of this path is a file; give a folder",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give another name",
    errno.ENOTEMPTY: "give another name",
    errno.ENOENT: "a folder of this path does not exist or was removed",
    errno.ENOMEM: "lower --workers or --batch-size",
    errno.EAGAIN: "lower --workers",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or lower --workers",
    errno.EIO: "the disk or network drive fails; try another one",
    errno.ESTALE: "the disk or network drive fails; try another one",
}


class Stopped(BaseException):
    """The program was told to end by signal `number`. Not an Exception, so that no `except Exception` catches it.

    sentence: what is printed; None: "stopped by" and the signal's name.
    """

    def __init__(self, number: int, sentence: str | None = None):
        self.number = number
        name = "SIGPIPE" if number == SIGPIPE else signal.Signals(number).name
        super().__init__(sentence or f"stopped by {name}")


def handle_signals(handler: Callable):
    """Call `handler(number, frame)` on each of `SIGNALS`; SIGHUP stays ignored where nohup has set it so."""
    for number in SIGNALS:
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once():
    """From now on a signal ends this process without any cleanup: used during the imports."""
    handle_signals(lambda number, _: os._exit(_say(Stopped(number), 128 + number)))


@contextlib.contextmanager
def exit_on_user_error():
    """End the program as this module describes, for a `UserError`, a signal, or a system error such as a full disk."""

    def stop(number, _):
        for each in SIGNALS:  # nothing interrupts the cleanup
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    handle_signals(stop)
    with _guarded("stdout"), _guarded("stderr"), _quiet_threads():
        try:
            yield
        except UserError as error:
            code = _say(f"error: {error}", 2)
        except Stopped as stopped:
            code = _say(stopped, 128 + stopped.number)
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = _sentence_of(error)
            if sentence is None:
                raise
            code = _say(f"error: {sentence}", 2)
        else:
            return
    sys.exit(code)


def has_ended(process_id: int) -> bool:
    """Whether no process on this machine has this id; False on Windows, where that cannot be checked."""
    if os.name == "nt":
        return False
    try:
        os.kill(process_id, 0)  # signal 0 only checks
    except (ProcessLookupError, OverflowError):  # OverflowError: larger than any id
        return True
    except OSError:  # another user's
        pass
    return False


def _sentence_of(error):
    """The sentence for a system error that a user can fix; None for any other."""
    if isinstance(error, OSError):
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {FIXES[error.errno]}." if error.errno in FIXES else None
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
        return "the GPU is out of memory: lower --batch-size, or use --precision bf16."
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "the memory of this machine is not enough: lower --batch-size or --workers, or the recipe's sizes."
    return None


def _say(sentence, code):
    """Print one line, and write an error (code 2) to torchrun's report; returns `code`.

    Only the main process prints. But without torchrun, whose report would show it, every process prints its error.
    """
    handle_signals(signal.SIG_DFL)  # a signal from now on ends the process at once
    report, is_main = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("RANK", "0") == "0"
    if report and code == 2 and not is_main:
        time.sleep(5)  # so the main process, with the same error, ends first; then torchrun ends this one
    with contextlib.suppress(OSError):  # where the report or stderr cannot be written
        if report and code == 2:
            extra = {"py_callstack": str(sentence), "timestamp": str(int(time.time()))}
            with open(report, "w") as file:
                json.dump({"message": {"message": str(sentence), "extraInfo": extra}}, file)
        if is_main or not report and code == 2:
            print(sentence, file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _quiet_threads():
    """Context in which a full disk, or another error of `FIXES`, prints no traceback of a thread such as TensorBoard's;
    the main thread gets the error too."""

    def failed(args):
        if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in FIXES):
            previous_hook(args)

    previous_hook, threading.excepthook = threading.excepthook, failed
    try:
        yield
    finally:
        threading.excepthook = previous_hook


@contextlib.contextmanager
def _guarded(name):
    """Context in which `sys.stdout` or `sys.stderr`, as `name` says, is wrapped in `_Guarded`."""
    stream = getattr(sys, name)
    setattr(sys, name, _Guarded(stream))
    try:
        yield
    finally:
        setattr(sys, name, stream)


class _Guarded:
    """Wrapper of stdout or stderr: once a write fails, output is discarded, and the program ends as if by SIGPIPE."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._try(self._stream.write, text)

    def flush(self):
        return self._try(self._stream.flush)

    def _try(self, do, *args):
        try:
            return do(*args)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            handler = signal.getsignal(signal.SIGTERM)  # as for all SIGNALS; in training it saves a checkpoint
            if callable(handler):
                handler(SIGPIPE, None)
