"""Files of image features, the targets of the loss `features`: written by the user, with any model of images.

    FOLDER/samples/CAM_FRONT/NAME.npy    features of DATA_ROOT/samples/CAM_FRONT/NAME.jpg

A file has one array [h, w, F] of float16 or float32: the features of h x w squares that cover the image, such as the
patches of a vision transformer. In an .npz, the array may have any name. All files have the same F. docs/data.md has a
script that writes them.
"""

import io
import math
import os
from pathlib import Path

import numpy as np

from unipad.data.dataset import BadFrame


def feature_files(image: str) -> tuple[str, str]:
    """The two names that the file of an image's features may have, below their folder; image: its path below the
    dataset's root."""
    stem, _ = os.path.splitext(image)
    return f"{stem}.npy", f"{stem}.npz"


def read_features(folder: Path, image: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """[h, w, F] float16 or float32 features of an image.

    image:    path of the image below the dataset's root.
    size:     (height, width) of the image, in the tables or of a scaled copy.
    channels: F that the file must have; 0 for any.

    Raises `BadFrame` for a file that is missing, damaged, of another shape or type, or has values that are not finite.
    """
    paths = [folder / file for file in feature_files(image)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise BadFrame(paths[0], "is missing")
    arrays = _arrays(path)
    if len(arrays) != 1:
        raise BadFrame(path, f"has {len(arrays)} arrays ({', '.join(arrays)}): keep only the one with the features")
    (features,) = arrays.values()
    if features.dtype not in (np.float16, np.float32):
        raise BadFrame(path, f"has values of type {features.dtype}: write float16 or float32")
    if features.ndim != 3 or not features.size or not _covers(features.shape, size):
        shape, image_shape = (" x ".join(map(str, s)) for s in (features.shape, size))
        raise BadFrame(
            path, f"has the shape {shape}: write [h, w, channels], for squares that cover the {image_shape} image"
        )
    if channels and features.shape[2] != channels:
        raise BadFrame(
            path,
            f"has {features.shape[2]} channels, but other files or --data.feature-channels have {channels}: write all "
            "files with one model; --data.feature-channels 0 takes the number from the files",
        )
    if not np.isfinite(features).all():
        raise BadFrame(path, "has values that are not finite: write it again, without NaN")
    return np.ascontiguousarray(features)


def _covers(shape, size):
    """Whether h x w squares of any one edge cover an image of `size`: their numbers along both axes are rounded down,
    or up, or to the nearest."""
    axes = list(zip(shape[:2], size, strict=True))
    for less, more in ((0, 1), (0.5, 0.5), (1, 0)):  # number - less <= length / edge <= number + more
        shortest = max(length / (number + more) for number, length in axes)
        longest = min(length / (number - less) if number > less else math.inf for number, length in axes)
        if shortest <= longest:
            return True
    return False


def _arrays(path):
    """{name: array} of a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror})") from None
    try:
        if not content.startswith(b"PK"):  # no archive
            return {"array": _array(content)}
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception:  # a damaged header or archive can make NumPy raise anything
        raise BadFrame(path, "is damaged, or no .npy or .npz file") from None


def _array(content):
    """The array in the bytes of a .npy file. Raises ValueError, also if their number is not what the header says, for
    which NumPy would allocate memory."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")
