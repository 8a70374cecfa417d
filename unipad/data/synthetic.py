"""Write the synthetic city in the real nuScenes on-disk format: 13 tables, lidarseg, six cameras, one LiDAR.

    python -m unipad.data.synthetic --out data/synthetic                      # 10 scenes of 4.5 seconds
    python -m unipad.data.synthetic --out data/full --image-size 900 1600     # the real resolution
    python -m unipad.data.synthetic --out data/sweeps --camera-sweeps 2       # images between the keyframes too
    python -m unipad.data.synthetic --out data/voxels --occupancy             # occupancy labels, in Occ3D's format

A city of up to 10 scenes has the version and scene names of nuScenes mini, so that every tool knows its splits; a
larger one has the version `city` and a splits.json of its own. The vehicle and location of the logs, the descriptions
of the scenes and a README.txt in the root say that the data is synthetic. unipad/data/city/ computes what is written.
"""

import ast
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import tyro
from tqdm import tqdm

from unipad.data.city import rig
from unipad.data.city.paint import Shadows, intensity, photograph
from unipad.data.city.raycast import cast
from unipad.data.city.records import (
    VERSIONS,
    data_file,
    districts_of,
    frames_of,
    is_large,
    labels_file,
    make_tables,
    map_file,
    occupancy_file,
    scene_names,
    scene_number,
    scene_of,
    splits_of,
    version_of,
)
from unipad.data.city.solids import CATEGORIES, CATEGORY
from unipad.data.city.streets import PITCH, STREETS, City
from unipad.errors import UserError
from unipad.exit import exit_on_user_error, has_ended

MAP_CELL = 0.1  # meters per pixel of the map, as the devkit assumes
MAP_SQUARE = 4  # pixels: side of the squares, each of one color, of which the map consists
FEATURES = 16  # channels of the features of the default city with features
FEATURE_SQUARE = 4  # pixels: side of the squares that features are of
LABELS_NEED = "scenes", "keyframes", "seed"  # settings on which occupancy labels and their files' names depend

README = """Synthetic data: a procedural city, ray cast and written in the nuScenes format by unipad.data.synthetic.

It contains no nuScenes data, and results on it say nothing about the real world. Up to 10 scenes have the version and
scene names of nuScenes mini, so that the same tools and splits work.

{settings}
"""


@dataclass(frozen=True)
class Args:
    """Write a synthetic city in the nuScenes format."""

    out: Path
    """Folder to write: new, empty, or an older synthetic dataset, which is replaced."""
    scenes: int = 10
    """Scenes, 2 to 1000. Up to 10 have the scene names of nuScenes mini, two of them for validation (one if there
    are only 2). More are spread over districts of 16, in any weather, with splits of their own: train.py --version
    city."""
    keyframes: int = 10
    """Keyframes per scene, at 2 Hz; 2 to 400."""
    image_size: tuple[int, int] = (144, 256)
    """Height and width of the images in pixels; nuScenes has 900 1600."""
    workers: int | None = None
    """Processes (default: one per core, at most 16); they do not change the result."""
    seed: int = 0
    """Seed of the city."""
    columns: int = 360
    """LiDAR azimuths per revolution, 16 to 4096; nuScenes has about 1084."""
    sweeps: int = 9
    """LiDAR sweeps before each keyframe but the first, at 20 Hz; 0 to 9."""
    camera_sweeps: int = 0
    """Frames of images before each keyframe but the first, at 12 Hz; 0 to 5."""
    features: int = 0
    """Channels of image features for the keyframes, in OUT/features, 0 to 1024: each class has a random vector, and a
    square of 4 x 4 pixels the mean of its pixels' vectors."""
    occupancy: bool = False
    """Write occupancy labels too; `finetune.py --task occupancy` adds them to a city that has none."""


class SettingError(UserError):
    """The error for an invalid setting."""


def generate(
    out,
    scenes=10,
    keyframes=10,
    image_size=(144, 256),
    workers=None,
    seed=0,
    columns=360,
    sweeps=9,
    camera_sweeps=0,
    features=0,
    occupancy=False,
    progress=True,
):
    """Write a synthetic dataset and return its root.

    The arguments are those of `Args`; `progress` shows a bar. The dataset is written to a folder next to `out` and
    renamed when complete. Workers are spawned: a script that calls this needs a `__main__` guard.
    Raises SettingError with one sentence for an invalid setting, or if `out` contains something that is not a synthetic
    dataset.
    """
    args = Args(
        Path(os.path.expanduser(out)),
        scenes,
        keyframes,
        tuple(image_size),
        workers,
        seed,
        columns,
        sweeps,
        camera_sweeps,
        features,
        occupancy,
    )
    _check(args)
    root = args.out.resolve()
    for folder in root.parent.glob(f".{root.name}.*-*"):  # left by killed processes
        state, _, process = folder.name.removeprefix(f".{root.name}.").partition("-")
        if state in ("partial", "old") and process.isdigit() and has_ended(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
    partial, old = (root.with_name(f".{root.name}.{state}-{os.getpid()}") for state in ("partial", "old"))
    try:
        _write(args, partial, progress)
        if root.exists():
            root.rename(old)
        partial.rename(root)
    finally:
        if old.exists() and not root.exists():  # the second renaming failed
            old.rename(root)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return args.out


def is_synthetic(root):
    """Whether a folder contains a dataset written by this module; False if its log.json is missing or damaged."""
    for version in VERSIONS:
        log = Path(root) / version / "log.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if {record["vehicle"] for record in json.loads(log.read_bytes())} == {"synthetic"}:
                return True
    return False


def ensure_city(camera_sweeps=0, with_features=False):
    """The root of the default dataset with that many `camera_sweeps`, and with `FEATURES` channels of features on
    request, which is generated if it does not exist yet."""
    root = Path(f"data/synthetic-{camera_sweeps}-camera-sweeps" if camera_sweeps else "data/synthetic")
    root = root.with_name(f"{root.name}-features") if with_features else root
    if not is_synthetic(root):
        print(f"no --data-root: generating a synthetic city in {root}, once", flush=True)
        generate(root, camera_sweeps=camera_sweeps, features=FEATURES if with_features else 0)
    return root


def add_occupancy(root, workers=None):
    """Write the occupancy labels that a synthetic city lacks; its other files stay as they are.

    workers: processes, as in `Args`. Raises SettingError if README.txt does not say how the city was made, or the files
    cannot be written.
    """
    settings = {}
    try:
        for line in (root / "README.txt").read_text().splitlines():
            name, _, value = line.partition(": ")
            if name in Args.__dataclass_fields__:
                try:
                    settings[name] = ast.literal_eval(value)
                except (ValueError, SyntaxError):
                    raise SettingError(f'its README.txt says "{line}"') from None
        if missing := [name for name in LABELS_NEED if name not in settings]:
            raise SettingError(f"its README.txt does not say {', '.join(missing)}")
        args = Args(out=root, workers=workers, **settings)
        _check(args)
        (root / "gts").mkdir(exist_ok=True)
    except (OSError, ValueError, TypeError, SettingError) as error:
        # with defaults in their place, another city would be generated
        given = {name: settings.get(name, name.upper()) for name in dict.fromkeys([*LABELS_NEED, *settings])}
        flags = " ".join(f"--{name.replace('_', '-')} {_as_flag(value)}" for name, value in given.items())
        raise SettingError(
            f"occupancy labels cannot be added to the synthetic city in {root} ({error}); generate it again, with the "
            f"settings that it has: python -m unipad.data.synthetic --out {root} --occupancy {flags}."
        ) from None
    print(f"making occupancy labels of the synthetic city in {root}, once", flush=True)
    _write_occupancy(args, root, progress=True)


def _as_flag(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _check(args):
    limits = {
        "scenes": (2, 1000),
        "keyframes": (2, 400),
        "columns": (16, 4096),
        "sweeps": (0, 9),
        "camera_sweeps": (0, 5),
        "features": (0, 1024),
        "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise SettingError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}.")
    if min(args.image_size) < 16:
        raise SettingError(f"--image-size {args.image_size[0]} {args.image_size[1]}: both must be at least 16 pixels.")
    if args.workers is not None and args.workers < 1:
        raise SettingError(f"--workers {args.workers}: must be at least 1.")
    if args.out.exists() and not args.out.is_dir():
        raise SettingError(f"--out {args.out}: is a file; give a folder.")
    if args.out.is_dir() and any(args.out.iterdir()) and not is_synthetic(args.out):
        raise SettingError(
            f"--out {args.out}: contains something that is not a synthetic dataset; give another folder."
        )


def _write(args, root, progress):
    folders = [f"{kind}/{channel}" for kind in ("samples", "sweeps") for channel in (*rig.CAMERAS, rig.LIDAR)]
    folders += [f"features/samples/{channel}" for channel in rig.CAMERAS if args.features]
    version = version_of(args)
    for folder in (*folders, "maps", version, f"lidarseg/{version}"):
        (root / folder).mkdir(parents=True)
    names = scene_names(args)
    results = _of_keyframes(_render, args, root, "synthetic city", progress)
    censuses = {name: results[i * args.keyframes : (i + 1) * args.keyframes] for i, name in enumerate(names)}
    for name, records in make_tables(args, censuses).items():
        (root / version / f"{name}.json").write_text(json.dumps(records, indent=0))
    if is_large(args):
        (root / version / "splits.json").write_text(json.dumps(splits_of(args), indent=0))
    for district in districts_of(args):
        _draw_map(args, root, district)
    without = ("out", "workers", "occupancy")  # the last: labels can be added later, and no file changes then
    settings = "\n".join(f"{name}: {value}" for name, value in vars(args).items() if name not in without)
    (root / "README.txt").write_text(README.format(settings=settings))
    if args.occupancy:
        _write_occupancy(args, root, progress)


def _write_occupancy(args, root, progress):
    _of_keyframes(_label, args, root, "occupancy labels", progress)


def _of_keyframes(work, args, root, title, progress):
    """The results of `work` for all keyframes, scene by scene, from several processes."""
    tasks = [(args, root, name, k) for name in scene_names(args) for k in range(args.keyframes)]
    workers = min(args.workers or min(16, os.cpu_count()), len(tasks))
    with tqdm(total=len(tasks), desc=title, unit="keyframe", disable=not progress) as bar:
        return _run_all(work, tasks, workers, bar.update)


def _run_all(work, tasks, workers, done):
    """The results of `work` for all tasks, in their order; calls `done` after each.

    If a worker dies, as when memory is short, the work continues with half as many, and finally in this process.
    """
    results = []
    while workers > 1 and len(results) < len(tasks):
        others = set(multiprocessing.active_children())
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (work,)) as pool:
            processes = set(multiprocessing.active_children()) - others
            rendered = pool.imap(work, tasks[len(results) :])
            while len(results) < len(tasks):
                try:
                    results.append(rendered.next(timeout=1))
                    done()
                except multiprocessing.TimeoutError:
                    if not all(process.is_alive() for process in processes):  # its task is lost: the pool would wait
                        print(f"one of {workers} processes died: going on with {workers // 2}", file=sys.stderr)
                        break
        workers //= 2
    for task in tasks[len(results) :]:
        results.append(work(task))
        done()
    return results


def _start_worker(work):
    # Ctrl-C reaches every process of the terminal: workers ignore it, and their parent ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if work is _label:
        import torch

        torch.set_num_threads(1)  # else every worker would use all cores


@lru_cache(maxsize=1)
def _shadows(scene):
    return Shadows(scene)


def _render(task):
    """Write the files of a keyframe and of the sweeps before it; returns, for each actor at the
    keyframe, its LiDAR points and visibility (`rig.census`), for the tables."""
    args, root, name, k = task
    scene = scene_of(args, name)
    for channel in rig.CAMERAS:
        for stamp, is_key in frames_of(args, channel, k):  # stamp: microseconds since the start of the scene
            view, solids = rig.camera_view(scene, channel, args.image_size, stamp / 1e6), scene.solids(stamp / 1e6)
            surfaces = cast(view, solids)  # distance and hit of every pixel
            image = photograph(scene, view, solids, *surfaces, _shadows(scene).at(solids))
            file = data_file(name, channel, stamp, is_key)
            _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
            # `write_bytes` raises an error if the disk is full; OpenCV's and NumPy's writers do not
            (root / file).write_bytes(jpeg)
            if args.features and is_key:
                _, category = intensity(scene.city, view, solids, *surfaces)
                np.save(npy := io.BytesIO(), class_features(category.reshape(view.shape), args.features))
                (root / "features" / file).with_suffix(".npy").write_bytes(npy.getvalue())
    for stamp, is_key in frames_of(args, rig.LIDAR, k):
        # 5: number of the random stream; the streets and the traffic have 1 to 4
        rng = np.random.default_rng([args.seed, 5, scene_number(name), stamp])
        scan = rig.scan(scene, stamp / 1e6, args.columns, rng)
        (root / data_file(name, rig.LIDAR, stamp, is_key)).write_bytes(scan.points.tobytes())
    # `stamp` and `scan` are now the keyframe's, which is the last frame of the loop
    (root / labels_file(args, name, stamp)).write_bytes(scan.category.tobytes())
    return rig.census(scene, stamp / 1e6, args.columns, scan)


def class_features(category, channels):
    """[h / 4, w / 4, channels] float16 features of an image whose pixels have `category` [h, w], 0 for the sky.

    The vectors of the classes have length 1 and depend on nothing but `channels`. At the right and at the bottom,
    squares may have fewer pixels.
    """
    vectors = np.random.default_rng(channels).standard_normal((len(CATEGORIES), channels))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pixels = vectors[category].astype(np.float32)
    starts = [np.arange(0, size, FEATURE_SQUARE) for size in category.shape]
    ones = np.ones((*category.shape, 1), np.float32)
    sums, counts = (np.add.reduceat(np.add.reduceat(a, starts[0], axis=0), starts[1], axis=1) for a in (pixels, ones))
    return (sums / counts).astype(np.float16)


def _label(task):
    """Write the occupancy labels of a keyframe, unless they exist."""
    from unipad.data.city.occupancy import occupancy_labels  # imports torch, which no other file of the city needs

    args, root, name, k = task
    file = root / occupancy_file(args, name, k)
    if file.exists():
        return
    stamps = {channel: frames_of(args, channel, k)[-1][0] / 1e6 for channel in (*rig.CAMERAS, rig.LIDAR)}
    time, keyframes = stamps.pop(rig.LIDAR), [frames_of(args, rig.LIDAR, i)[-1][0] / 1e6 for i in range(args.keyframes)]
    arrays = occupancy_labels(scene_of(args, name), time, keyframes, stamps)
    of_scene = file.parent.parent
    of_scene.mkdir(parents=True, exist_ok=True)
    unfinished = of_scene / f".{file.parent.name}.{os.getpid()}"
    with open(unfinished, "wb") as opened:
        np.savez_compressed(opened, **arrays)
    file.parent.mkdir(exist_ok=True)
    unfinished.replace(file)


def _draw_map(args, root, district):
    """The semantic prior map of a district, white where vehicles or pedestrians may be; row 0 is the largest y."""
    count = int(STREETS * PITCH / MAP_CELL) // MAP_SQUARE
    middle = ((np.arange(count) + 0.5) * MAP_CELL * MAP_SQUARE).astype(np.float32)
    x, y = np.meshgrid(middle, middle[::-1])
    category, _, _ = City.of(args.seed, district).ground(x.ravel(), y.ravel())
    allowed = np.isin(category, [CATEGORY["flat.driveable_surface"], CATEGORY["flat.sidewalk"]]).reshape(count, count)
    image = (allowed * np.uint8(255)).repeat(MAP_SQUARE, axis=0).repeat(MAP_SQUARE, axis=1)
    _, png = cv2.imencode(".png", image)
    (root / map_file(args, district)).write_bytes(png)


def main():
    args = tyro.cli(Args)
    generate(**vars(args))
    print(f"synthetic city in {args.out}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
