"""Occupancy labels of a keyframe, as Occ3D-nuScenes (arXiv 2304.14365) stores them: gts/<scene>/<token>/labels.npz.

    semantics    [200, 200, 16] uint8 class 0 to 17, see `unipad.batch.OCCUPANCY_CLASSES`
    mask_lidar   the same shape, 1: a LiDAR ray of the scene has passed through the voxel, or ended in it
    mask_camera  the same shape, 1: in addition, a camera of this keyframe sees the voxel

Axes are x, y and z of the ego frame. Labels of other benchmarks on nuScenes have other grids, classes or arrays, and
are refused.
"""

import zipfile
from pathlib import Path

import numpy as np

from unipad.batch import OCCUPANCY_CLASSES, OCCUPANCY_SHAPE
from unipad.data.dataset import BadFrame

ARRAYS = ("semantics", "mask_lidar", "mask_camera")
# bytes of an array in a file, at most: a damaged header must not make NumPy allocate all memory
MAX_BYTES = 8 * np.prod(OCCUPANCY_SHAPE) + 4096


def read_occupancy(path: Path) -> np.ndarray:
    """[3, X, Y, Z] uint8: class, 0 or 1 where LiDAR rays saw the voxel, and where cameras did. Raises `BadFrame`."""
    shape = " x ".join(map(str, OCCUPANCY_SHAPE))
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        if missing := [name for name in ARRAYS if name not in members]:
            raise BadFrame(path, f"has no array {missing[0]}: these are not labels of Occ3D-nuScenes")
        if max(members[name] for name in ARRAYS) > MAX_BYTES:
            raise BadFrame(path, f"has arrays of more than {shape} voxels, which is the grid of Occ3D-nuScenes")
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in ARRAYS]
    except FileNotFoundError:
        raise BadFrame(path, "is missing") from None
    except BadFrame:
        raise
    except OSError as error:
        raise BadFrame(path, f"cannot be read ({error.strerror or error})") from None
    except Exception:  # a damaged archive raises BadZipFile, zlib.error, ValueError, NotImplementedError, ...
        raise BadFrame(path, "is damaged, or not an .npz file") from None
    for name, array in zip(ARRAYS, arrays, strict=True):
        if array.shape != OCCUPANCY_SHAPE:
            raise BadFrame(path, f"has {name} of shape {array.shape}, but Occ3D-nuScenes' grid has {shape} voxels")
        most = len(OCCUPANCY_CLASSES) - 1 if name == "semantics" else 1
        if array.dtype.kind not in "bui" or array.min() < 0 or array.max() > most:
            raise BadFrame(path, f"has {name} that are not whole numbers from 0 to {most}")
    return np.stack(arrays).astype(np.uint8)
