"""Files of image features, the targets of the loss `features`: written by the user, with any model of images.

    FOLDER/samples/CAM_FRONT/NAME.npy    features of DATA_ROOT/samples/CAM_FRONT/NAME.jpg

A file has one array [h, w, F] of float16 or float32: the features of h x w squares that cover the image, such as the
patches of a vision transformer; its name does not matter in an .npz. All files have the same F. docs/data.md has a
script that writes them.
"""

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
        raise BadFrame(path, f"has {len(arrays)} arrays ({', '.join(arrays)}): keep only that of the features")
    (features,) = arrays.values()
    if features.dtype not in (np.float16, np.float32):
        raise BadFrame(path, f"has values of type {features.dtype}: write float16 or float32")
    if features.ndim != 3 or not features.size or not _covers(features.shape, size):
        shape, image_shape = (" x ".join(map(str, s)) for s in (features.shape, size))
        raise BadFrame(
            path, f"has the shape {shape}: write [h, w, channels], of squares that cover the {image_shape} image"
        )
    if channels and features.shape[2] != channels:
        raise BadFrame(
            path,
            f"has {features.shape[2]} channels, not {channels}, as others or --data.feature-channels: write all files "
            "with one model",
        )
    if not np.isfinite(features).all():
        raise BadFrame(path, "has values that are not finite: write it again, without NaN")
    return np.ascontiguousarray(features)


def _covers(shape, size):
    """Whether h x w squares cover an image of `size`, up to less than one of them along each axis."""
    (h, w), (height, width) = shape[:2], size
    return abs(h * width - w * height) <= width + height


def _arrays(path):
    """{name: array} of a file."""
    try:
        # mapped, since a damaged header must not make NumPy allocate all memory; an archive is read all the same
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"array": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except PermissionError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror})") from None
    except Exception:  # a damaged header or archive can make NumPy raise anything
        raise BadFrame(path, "is damaged, or no .npy or .npz file") from None
