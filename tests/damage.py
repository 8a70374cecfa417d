"""Fuzz test: damage files of every kind that the project reads, and classify what reading them results in.

    python -m tests.damage --cases 2000 --processes 2   # a table of outcomes; exit code 1 if any is a fault (capitals)
    python -m tests.damage --cases 500 --kind tables    # one kind of file
    python -m tests.damage --only 1234                  # one case and its traceback; --seed and --kind as before

The seed and the number of a case determine a kind of file, a file of that kind, and a way to damage it. A forked child
with limits of time and memory reads the damaged file as the scripts do. The outcomes:

    refused    a `UserError`: one sentence that names a file, folder or flag
    skipped    what is damaged is left out, and a message names the file; all else is read as before
    same       the result equals that of the undamaged file: the bytes did not matter, or a cache was rebuilt
    other      another result, accepted without a message: no check can detect the damage, see below
    SILENT     another result without a message although the damage can be detected, or an impossible result
    TRACEBACK  an exception or a message that is not fit for users, or a crash of the process
    HANG       no result within the time limit

Which damage can be detected? Checkpoints, PNGs and caches have checksums, so a result that differs without a message is
SILENT. In every format, the damages in `DETECTABLE` can be detected too: values of a wrong type, missing fields,
numbers that are not finite, files that are empty, missing or all zeros. Any other changed result is `other`: not
harmless, but no check can detect it:

    LiDAR      another coordinate or intensity within the sensor's range; blocks of zeros, since some sensors write
               zeros for rays without a return; a range removed, if the size still is that of whole points
    JPEG       other coefficients. libjpeg notices most damage of more than one bit and prints a warning without the
               file's name, but OpenCV returns the image as if it were intact
    lidarseg   another class, also 0 (unlabeled) in the whole file; no lidarseg.json
    JSON       another number or name that is possible; a record that no other refers to, missing, repeated or moved
    any        replaced by another file of its kind

In these cases, the result only has to be possible (`readers.sample_faults`). Only a checksum would detect the damage.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tests.readers import KINDS, Readout, make_files, warm_up
from unipad.errors import UserError

REPO = Path(__file__).parents[1]
OUTCOMES = ("refused", "skipped", "same", "other", "SILENT", "TRACEBACK", "HANG")
FAULTS = OUTCOMES[4:]  # those in capitals
SECONDS = 60  # time limit of a case; one that does not hang takes less than a second
MEMORY = 6 * 2**30  # bytes that a case may add to its address space: a damaged size must not exhaust the machine


# Ways to damage a file: functions of (random generator, bytes of the file, paths of an intact file of each kind) that
# return the damaged bytes


def flip(rng, data, _, bits=1):
    damaged = np.frombuffer(data, np.uint8).copy()
    for bit in rng.integers(8 * max(len(data), 1), size=bits if len(data) else 0):
        damaged[bit // 8] ^= 1 << (bit % 8)
    return damaged.tobytes()


def overwrite(rng, data, _, byte):
    """Overwrite a range with equal bytes, as after a lost disk block or an incomplete download."""
    first = int(rng.integers(max(len(data), 1)))
    size = min(int(2 ** rng.uniform(0, 13)), len(data) - first)
    return data[:first] + bytes([byte]) * size + data[first + size :]


def splice(rng, data, _):
    """Remove a range of bytes."""
    first, last = sorted(rng.integers(len(data) + 1, size=2).tolist())
    return data[:first] + data[last:]


BYTES = {  # for files of any format
    "one bit flipped": flip,
    "64 bits flipped": partial(flip, bits=64),
    "cut": lambda rng, data, _: data[: int(rng.integers(len(data) + 1))],
    "last byte cut": lambda rng, data, _: data[:-1],
    "empty": lambda rng, data, _: b"",
    "zeros": partial(overwrite, byte=0),
    "0xff": partial(overwrite, byte=0xFF),
    "only zeros": lambda rng, data, _: bytes(len(data)),
    "noise": lambda rng, data, _: rng.bytes(len(data)),
    "spliced": splice,
    "appended": lambda rng, data, _: data + rng.bytes(int(rng.integers(1, 100))),
    "doubled": lambda rng, data, _: data + data,
    "as text": lambda rng, data, _: data.replace(b"\n", b"\r\n"),  # as after an FTP transfer in text mode
    # an intact file of any kind, sometimes of its own
    "another kind": lambda rng, data, others: others[int(rng.integers(len(others)))].read_bytes(),
    "missing": None,  # this and the next: see `Harness._damage`
    "a folder": None,
}

# Replacements for a value of a JSON file; those in NUMBERS replace only numbers.
WRONG = (None, [], {}, "text", [[]], {"a": None}, "\0", "../" * 9 + "etc/passwd", float("nan"), float("inf"))
NUMBERS = (0, -1, 1e9, -1e30, 1e308, 2**31, 2**63, 10**30, 1e-320)


def wrong_type(rng, data, _):
    """Replace a random value of a JSON file by one of a wrong type, NaN or infinity, or delete its field."""
    tree = json.loads(data)
    holder, key = _node(rng, tree, lambda value: True)
    wrong = [w for w in WRONG if type(w) is not type(holder[key]) or isinstance(w, float)]
    if isinstance(holder, dict) and rng.integers(4) == 0:
        del holder[key]
    else:
        holder[key] = wrong[int(rng.integers(len(wrong)))]
    return json.dumps(tree).encode()


def wrong_number(rng, data, _):
    tree = json.loads(data)
    holder, key = _node(rng, tree, lambda value: type(value) in (int, float))
    if holder is None:
        return data
    holder[key] = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return json.dumps(tree).encode()


def wrong_record(rng, data, _):
    """Remove a record, move it to the end, or move it there twice."""
    tree = json.loads(data)
    if not isinstance(tree, list) or not tree:
        return data
    record = tree.pop(int(rng.integers(len(tree))))
    tree += [record] * int(rng.integers(3))
    return json.dumps(tree).encode()


def nested(rng, data, _):
    """Nest the JSON value in more brackets than any parser supports."""
    return b"[" * 100_000 + data + b"]" * 100_000


def _node(rng, tree, chosen):
    """(dict or list, key) of a random value in a tree, among those with `chosen(value)`; (None, None) without one."""
    nodes, open_nodes = [], [tree]
    while open_nodes:
        holder = open_nodes.pop()
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if chosen(value):
                nodes.append((holder, key))
            if isinstance(value, dict | list):
                open_nodes.append(value)
    return nodes[int(rng.integers(len(nodes)))] if nodes else (None, None)


JSON = {"wrong type": wrong_type, "wrong number": wrong_number, "records": wrong_record, "nested": nested}


def wrong_line(rng, data, others):
    """Replace one line of a JSON lines file by one with a value of a wrong type, or by one that is not JSON."""
    lines = data.split(b"\n")
    k = int(rng.integers(len(lines) - 1))  # not what follows the last newline
    choices = (b"null", b"[]", b"3", b'"text"', b"{", b"\xff\xfe", b"\0", b'{"step": null}', b'{"step": "9"}', b"")
    line = choices[int(rng.integers(len(choices)))] if rng.integers(2) else wrong_type(rng, lines[k], others)
    return b"\n".join([*lines[:k], line, *lines[k + 1 :]])


def wrong_object(rng, data, _):
    """Replace or delete an entry of a checkpoint, or replace all of it; the file itself can be loaded."""
    tree = torch.load(io.BytesIO(data), weights_only=True)
    if rng.integers(8) == 0:
        tree = (None, {}, [], "text", 3, torch.zeros(3), {"model": None}, [tree])[int(rng.integers(8))]
    else:
        holder, key = _node(rng, tree, lambda value: True)
        value = holder[key]
        if isinstance(value, torch.Tensor) and rng.integers(2):
            wrong = [value[None], value.flatten()[:-1], torch.full(value.shape, torch.nan), value.to(torch.complex64)]
        else:
            wrong = [None, {}, [], "text", True, torch.zeros(0)]
            wrong = [w for w in wrong if type(w) is not type(value)] + [float("nan")]
        if isinstance(holder, dict) and rng.integers(3) == 0:
            del holder[key]
        else:
            holder[key] = wrong[int(rng.integers(len(wrong)))]
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


# Damages for each `Kind.format`, in addition to `BYTES`
SPECIAL = {"json": JSON, "json lines": {"wrong line": wrong_line}, "checkpoint": {"wrong object": wrong_object}}

# Damages that can always be detected, unlike a lost record, another number or another byte
DETECTABLE = {"wrong type", "wrong line", "wrong object", "nested", "empty", "missing", "a folder", "only zeros"}
# (pattern of the file, damage): exceptions to DETECTABLE, since an intact dataset may look like this
PLAUSIBLE = (
    ("city/lidarseg/*/*.bin", "only zeros"),  # class 0: unlabeled points
    ("city/*/lidarseg.json", "missing"),  # a dataset without labels of points; tasks that need them are refused
)


@dataclass(frozen=True)
class Result:
    """The outcome of a case; `reason` has details, such as the error message or where the exception was raised."""

    outcome: str
    reason: str = ""


class Harness:
    """Intact files of all kinds, and what their readers return for them."""

    def __init__(self, folder: Path, kinds=KINDS, city: Path | None = None):
        """city: root of a synthetic dataset to copy; None: generate one."""
        self.folder, self.kinds, self.intact = folder, kinds, folder / "intact"
        failed = self._run(partial(make_files, self.intact, city), seconds=600)
        assert failed is None, failed.reason
        self.files = {name: sorted(self.intact.glob(kind.files)) for name, kind in kinds.items()}
        empty = [name for name, files in self.files.items() if not files]
        assert not empty, f"no files of {empty}"
        self.others = [files[0] for files in self.files.values()]
        warm_up()
        readers = dict.fromkeys(kind.read for kind in kinds.values())  # several kinds share one
        expected = {read: self._expected(read) for read in readers}
        self.expected = {name: expected[kind.read] for name, kind in kinds.items()}

    def _expected(self, read):
        with self._copy() as folder:
            readout = self._run(partial(read, folder))
        assert isinstance(readout, Readout) and readout.parts and not readout.skipped and not readout.faults, readout
        return readout

    @contextlib.contextmanager
    def _copy(self):
        """A temporary folder with the intact files: copies of JSON files, since readers may modify log.jsonl, and links
        to others."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))

        def copy(source, target):
            (shutil.copy2 if ".json" in Path(source).name else os.link)(source, target)

        try:
            shutil.copytree(self.intact, folder, copy_function=copy, dirs_exist_ok=True)
            (folder / "intact").symlink_to(self.intact)  # for readers that need an undamaged file, or the original
            yield folder
        finally:
            shutil.rmtree(folder)

    def case(self, seed: int, number: int, kind: str | None = None) -> tuple[str, Path, str, Callable]:
        """(kind, path relative to the folder, name of the damage, function that damages the file at a path)."""
        rng = np.random.default_rng([seed, number])
        names = [name for name, k in self.kinds.items() for _ in range(k.weight)]
        kind = kind or names[number % len(names)]
        special = SPECIAL.get(self.kinds[kind].format)
        damages = special if special and rng.integers(2) else BYTES
        name = list(damages)[int(rng.integers(len(damages)))]
        file = self.files[kind][int(rng.integers(len(self.files[kind])))].relative_to(self.intact)
        return kind, file, name, partial(self._damage, rng, name, damages[name])

    def run_case(self, seed: int, kind: str | None, seconds: float, number: int) -> tuple[str, Path, str, Result]:
        """(kind, path, name of the damage, result) of one case."""
        case = self.case(seed, number, kind)
        return *case[:3], self.read_damaged(*case, seconds)

    def _damage(self, rng, name, function, path):
        data = path.read_bytes()
        path.unlink()  # it may be a hard link to the intact file, which must not change
        if name == "a folder":
            path.mkdir()
        elif name != "missing":
            damaged = function(rng, data, self.others)
            # a damage without effect, such as CRLF in a file without LF, becomes one bit flipped
            path.write_bytes(flip(rng, data, None) if damaged == data else damaged)

    def read_damaged(self, kind: str, file: Path, name: str, damage: Callable, seconds: float = SECONDS) -> Result:
        """Damage `file` in a copy of all files with `damage(path)`, and read the copy with the reader of `kind`.

        name: of the damage.
        """
        with self._copy() as folder:
            damage(folder / file)
            plausible = any(file.match(pattern) and name == damage_name for pattern, damage_name in PLAUSIBLE)
            detectable = name in DETECTABLE and not plausible
            judge = partial(_judge, self.kinds[kind], folder, file, detectable, self.expected[kind])
            return self._run(judge, seconds)

    def _run(self, function, seconds=SECONDS):
        """What a function returns in a forked child, or the `Result` of an exception, a crash or a timeout."""
        receiver, sender = FORK.Pipe(duplex=False)
        with tempfile.TemporaryFile() as output:
            child = FORK.Process(target=_child, args=(function, sender, output))
            child.start()
            sender.close()
            if not receiver.poll(seconds):
                child.kill()
                result = Result("HANG", f"no end in {seconds} s")
            else:
                try:
                    result = receiver.recv()
                except EOFError:
                    child.join()
                    result = Result("TRACEBACK", f"the process died with {child.exitcode}")
            child.join()
            return result


FORK = get_context("fork")


def _child(function, sender, output):
    """Send what `function()` returns, or the `Result` of its exception; what it prints goes to the file `output`."""
    for fd in (1, 2):
        os.dup2(output.fileno(), fd)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(output.fileno()), "w", buffering=1) for _ in range(2))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()  # bytes of address space
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    try:
        result = function()
    except UserError as error:
        result = Result("refused", str(error))
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if str(REPO) in f.filename and "/tests/" not in f.filename] or frames
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        reason = f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:160]}"
        result = Result("TRACEBACK", reason + "\n" + "".join(traceback.format_exception(error)))
    sender.send(result)
    sender.close()
    os._exit(0)


def _judge(kind, folder, file, detectable, expected):
    """Read a damaged file, in the child, and return the `Result`.

    kind: a `readers.Kind`. detectable: whether the damage can be detected. expected: the `Readout` of the intact files.
    """
    try:
        readout = kind.read(folder)
    except UserError as error:
        sentence = str(error)
        if "\n" in sentence or not sentence.endswith(".") or not re.search(rf"{folder}|--|checkpoints/", sentence):
            return Result("TRACEBACK", f"not one sentence with a file, folder or flag: {sentence}")
        return Result("refused", sentence.replace(str(folder), ""))
    sys.stderr.flush()
    with open("/proc/self/fd/2", "rb") as output:  # the file to which `_child` redirects output, from its beginning
        printed = output.read().decode(errors="replace")
    # a damaged table may refer to a wrong file: then the message names that one
    unnamed = [r for r in readout.skipped.values() if not re.search(rf"{folder}/.*: ", r)]
    unnamed += [r for r in readout.skipped.values() if file.suffix != ".json" and file.name not in r]
    if unnamed:
        return Result("TRACEBACK", f"a skipped part does not name the file: {unnamed[0]}")
    if readout.faults:
        return Result("SILENT", readout.faults[0])
    parts = expected.parts.keys() | readout.parts.keys()
    changed = sorted(p for p in parts - readout.skipped.keys() if readout.parts.get(p) != expected.parts.get(p))
    # words of a printed line that names unusable frames, boxes or log lines
    reported = ("left out", "skipped ", "removed ")
    left_out = changed and any(file.name in l and any(r in l for r in reported) for l in printed.splitlines())
    if left_out:
        changed = []
    if changed and (kind.checked or detectable):
        return Result("SILENT", f"{changed[0]} differs")
    if changed:
        return Result("other", f"{changed[0]} differs")
    if readout.skipped:
        return Result("skipped", next(iter(readout.skipped.values())).replace(str(folder), ""))
    return Result("skipped" if left_out else "same")


def print_outcomes(numbers, results):
    """Print the outcomes by kind of file, and an example of each group of similar faults; returns the number of faults.

    results: of `Harness.run_case` for each of `numbers`.
    """
    counts, groups = defaultdict(Counter), defaultdict(list)
    progress = tqdm(results, "damaging", len(numbers), disable=None)
    for number, (kind, file, damage, result) in zip(numbers, progress, strict=True):
        counts[kind][result.outcome] += 1
        if result.outcome in FAULTS:
            first = result.reason.splitlines()[0]
            key = kind, result.outcome, first.split(": ")[0] if result.outcome == "TRACEBACK" else first
            groups[key].append((number, file, damage, result))
    print(f"{'kind':<18}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    rows = {**counts, "all": sum(counts.values(), Counter())}
    for kind, of_kind in rows.items():
        print(f"{kind:<18}" + "".join(f"{of_kind[outcome] or '':>11}" for outcome in OUTCOMES))
    for (kind, outcome, _), cases in sorted(groups.items(), key=lambda item: -len(item[1])):
        number, file, damage, result = cases[0]
        print(f"\n{outcome} x {len(cases)}  {kind}: {file}, {damage}, such as --only {number}")
        print("  " + (result.reason if len(numbers) == 1 else result.reason.splitlines()[0]))
    return sum(map(len, groups.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, help="damage only files of this kind")
    parser.add_argument("--only", type=int, help="number of the only case to run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a case")
    parser.add_argument("--processes", type=int, default=1, help="parallel cases; each needs one core")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {args.kind: KINDS[args.kind]} if args.kind else KINDS
        harness = Harness(Path(folder), kinds)
        numbers = range(args.first, args.first + args.cases) if args.only is None else [args.only]
        with ProcessPoolExecutor(args.processes, FORK) as pool:
            run_case = partial(harness.run_case, args.seed, args.kind, args.seconds)
            faults = print_outcomes(numbers, pool.map(run_case, numbers, chunksize=4))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
