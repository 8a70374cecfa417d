"""Files of a dataset: which exist, and the contents of images and point clouds, checked."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from unipad.data.dataset import BadFrame, DataError
from unipad.data.index import MAX_DISTANCE

MAX_INTENSITY = 65535.0  # a larger one means a damaged file: some LiDARs have 16 bits, nuScenes' has 8


def read_bytes(path):
    """The contents of a file, [n] uint8. Raises `BadFrame`, also for an empty file."""
    try:
        data = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise BadFrame(path, "is missing") from None
    except OSError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror})") from None
    if not len(data):
        raise BadFrame(path, "is empty")
    return data


def image_size(path, data):
    """(height, width) from the header of a file in any format."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception:  # a damaged header can make Pillow's parsers raise anything
        raise BadFrame(path, "is not an image") from None


def decode_image(path, data):
    """[h, w, 3] uint8 BGR, as stored: calibration knows nothing of the rotation that EXIF data asks for."""
    # OpenCV fills what a truncated JPEG lacks with gray, so look for the end marker, FF D9, after the start of the last
    # scan, FF DA (a thumbnail's end comes before it). OpenCV itself rejects truncated files of other formats.
    content = data.tobytes()
    if content.startswith(b"\xff\xd8") and content.rfind(b"\xff\xd9") <= content.rfind(b"\xff\xda"):
        raise BadFrame(path, "the JPEG is truncated")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None:
        raise BadFrame(path, "is damaged, or in a format that OpenCV cannot read")
    return image


def read_points(path):
    """[P, 5] float32: x, y, z meters in the sensor's frame, intensity, ring."""
    data = read_bytes(path)
    if len(data) % 20:
        raise BadFrame(path, f"is truncated: {len(data)} bytes are not a whole number of 20-byte points")
    points = data.view(np.float32).reshape(-1, 5)
    if not np.isfinite(points[:, :4]).all():
        raise BadFrame(path, "has values that are not finite")
    if not points[:, :3].any():
        raise BadFrame(path, "has only zeros as coordinates")
    farthest, strongest = (np.abs(values).max() for values in (points[:, :3], points[:, 3]))
    if farthest > MAX_DISTANCE or strongest > MAX_INTENSITY:
        raise BadFrame(path, f"has a point {farthest:.3g} m away, or an intensity of {strongest:.3g}: it is damaged")
    return points


def on_disk(root: Path, files: np.ndarray) -> np.ndarray:
    """Which of `files`, paths relative to `root` in bytes, exist: an array of bool of the same shape.

    Each folder is listed once: checking half a million files one by one takes minutes on a network file system.
    """
    listed = {}

    def exists(name):
        folder, _, file = name.rpartition(b"/")
        if folder not in listed:
            listed[folder] = _listed(root / folder.decode())
        return file in listed[folder]

    return np.array([exists(name) for name in files.ravel().tolist()], bool).reshape(files.shape)


def _listed(folder):
    """The set of names in a folder, as bytes; empty if the folder does not exist."""
    try:
        return set(map(os.fsencode, os.listdir(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error.strerror}); make it readable.") from None
