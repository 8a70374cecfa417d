"""What the tables of nuScenes must contain: each row is checked when it is read; errors name the table and the row.

The devkit, which joins the tables, trusts them: a fault in one shows up as an exception somewhere else, or never.
"""

import json
import math
import reprlib
from pathlib import Path

from unipad.data.dataset import DataError

MAX_LENGTH = (
    1000  # characters of a name: in the cached index, every entry of an array of names is as wide as the longest
)
MAX_INTEGER = 2**62  # integers must be smaller: so the difference of two times, in microseconds, fits into int64
MAX_TRANSLATION = {"calibrated_sensor": 100.0, "ego_pose": 1e8}  # meters per axis; UTM coordinates reach 1e7


def read_table(folder: Path, name: str) -> list[dict]:
    """The rows of one table. Raises `DataError`, which names the file and the row."""
    file = folder / f"{name}.json"
    try:
        rows = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); unpack the metadata again.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error}); unpack the metadata again.") from None
    if not isinstance(rows, list):
        raise DataError(f"{file} is not a list of rows; unpack the metadata again.")
    checks = {"token": NAME, **FIELDS.get(name, {}), **dict.fromkeys(REFERENCES.get(name, {}), NAME)}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise row_error(folder, name, number, "is not an object with named fields")
        for field, (is_valid, expected) in checks.items():
            if not is_valid(row.get(field)):
                raise row_error(folder, name, number, f"{field} is not {expected}: {reprlib.repr(row.get(field))}")
    return rows


def open_tables(root: Path, version: str, verbose: bool):
    """The devkit's `NuScenes`, with every row checked; `verbose`: the devkit prints its progress.

    Raises `DataError`, and whatever else the devkit raises.
    """
    from nuscenes import NuScenes

    folder = root / version

    class CheckedNuScenes(NuScenes):
        def __load_table__(self, table_name):
            return read_table(folder, table_name)

        def __make_reverse_index__(self, verbose):
            _check_references(self, folder)
            maps = self.map
            self.map = maps or [{"token": "", "log_tokens": []}]  # the devkit reads map[0] even if there is none
            super().__make_reverse_index__(verbose)
            self.map = maps

    return CheckedNuScenes(version, str(root), verbose=verbose)


def row_error(folder: Path, table: str, row: int, what: str) -> DataError:
    """The error for one row of a table."""
    return DataError(f"{folder / table}.json, row {row}: {what}; correct it, or unpack the metadata again.")


def box_fault(annotation: dict) -> str | None:
    """Why the box of a row of sample_annotation cannot be used; None if it can."""
    size, (center, rotation) = annotation["size"], (annotation[name] for name in ("translation", "rotation"))
    if not all(0 < edge <= 100 for edge in size):  # NaN fails too; the longest road trains have 54 m
        return f"size {size} is not between 0 and 100 m"
    if not all(abs(meters) <= MAX_TRANSLATION["ego_pose"] for meters in center):  # boxes too are in the global frame
        return f"translation {center} is not within 1e8 m of the origin"
    return None if _is_unit(rotation) else f"rotation {rotation} is not a unit quaternion"


def _check_references(tables, folder):
    """Raises `DataError` unless every token that a row refers to exists, all tokens of a table differ, and every log
    has a map."""
    tokens = {}
    for name in tables.table_names:
        rows = getattr(tables, name)
        tokens[name] = {row["token"] for row in rows}
        if len(tokens[name]) < len(rows):
            seen = set()
            number = next(i for i, row in enumerate(rows) if row["token"] in seen or seen.add(row["token"]))
            raise row_error(folder, name, number, f"has the token of an earlier row, {rows[number]['token']}")
    for name, fields in REFERENCES.items():
        for field, target in fields.items() if name in tokens else ():  # lidarseg is optional
            known = tokens[target] | ({""} if target == name else set())  # prev and next: "" at the ends of a chain
            for number, row in enumerate(getattr(tables, name)):
                if row[field] not in known:
                    raise row_error(folder, name, number, f"{field} {row[field]} is not in any row of {target}.json")
    # The devkit looks up the map of every log
    mapped = {token for row in tables.map for token in row["log_tokens"]}
    for number, row in enumerate(tables.log):
        if row["token"] not in mapped:
            raise row_error(
                folder, "log", number, f"its token {row['token']} is not in the log_tokens of any row of map.json"
            )


def _is_name(value):
    """Text that is safe as a token, or as a file's name."""
    if not isinstance(value, str) or len(value) > MAX_LENGTH or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)  # a surrogate has no UTF-8


def _is_file(value):
    """The path of a file below the root: it must not lead out of the root, on any system."""
    if not _is_name(value):
        return False
    parts = value.replace("\\", "/").split("/")
    return parts[0] != "" and ":" not in parts[0] and ".." not in parts


def _is_number(value):
    """A float, NaN included, or an integer below `MAX_INTEGER`, but no bool."""
    return isinstance(value, float) or (type(value) is int and abs(value) < MAX_INTEGER)


def _is_at_least_0(value):
    return _is_number(value) and 0 <= value < math.inf


def _is_time(value):
    return _is_number(value) and 0 <= value < MAX_INTEGER


def _is_vector(value):
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_quaternion(value):
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_unit(value):
    return abs(math.hypot(*value) - 1) < 0.01  # False for NaN


def _is_intrinsic(value):
    """Empty, as for sensors that are no cameras, or a matrix that maps camera meters to pixels and has an inverse."""
    if value == []:
        return True
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_vector, value))):
        return False
    (fx, skew, cx), (zero, fy, cy), last = value
    return (
        all(0 < focal < 1e6 for focal in (fx, fy))
        and all(abs(pixels) < 1e6 for pixels in (skew, cx, cy))
        and (zero, *last) == (0, 0, 0, 1)
    )


# Checks of a field: (function that says whether a value is valid, what is expected, for the message)
NAME = _is_name, f"text of at most {MAX_LENGTH} characters"
FILE = _is_file, "the path of a file below the root"
AT_LEAST_0 = _is_at_least_0, "a number that is 0 or more"
TIME = _is_time, "a time in microseconds"
FLAG = (lambda value: value in (0, 1)), "true or false"
ROTATION = (lambda value: _is_quaternion(value) and _is_unit(value)), "a unit quaternion w, x, y, z"
TOKENS = (lambda value: isinstance(value, list) and all(map(_is_name, value))), "a list of tokens"
BYTE = (lambda value: value is None or (type(value) is int and 0 <= value < 256)), "a number from 0 to 255"  # or absent


def _translation(table):
    """The check, as above, of the field `translation` of a table."""
    most = MAX_TRANSLATION[table]

    def is_valid(value):
        return _is_vector(value) and all(abs(meters) <= most for meters in value)

    return is_valid, f"three numbers of at most {most:.0f} meters"


# table -> field -> check, of the fields that are read; `read_table` adds `token` and `REFERENCES`. Of boxes only the
# types are checked: a box with impossible values is left out (`box_fault`); a fault found here rejects the dataset.
FIELDS = {
    "category": {"name": NAME, "index": BYTE},  # only lidarseg needs the index
    "attribute": {"name": NAME},
    "sensor": {"channel": NAME, "modality": NAME},
    "calibrated_sensor": {
        "translation": _translation("calibrated_sensor"),
        "rotation": ROTATION,
        "camera_intrinsic": (_is_intrinsic, "a matrix fx s cx, 0 fy cy, 0 0 1 with fx and fy above 0"),
    },
    "ego_pose": {"translation": _translation("ego_pose"), "rotation": ROTATION},
    "scene": {"name": NAME},
    "map": {"log_tokens": TOKENS, "filename": FILE},
    "sample": {"timestamp": TIME},
    "sample_data": {"timestamp": TIME, "is_key_frame": FLAG, "filename": FILE},
    "sample_annotation": {
        "translation": (_is_vector, "three numbers"),
        "size": (_is_vector, "three numbers"),
        "rotation": (_is_quaternion, "four numbers"),
        "num_lidar_pts": AT_LEAST_0,
        "num_radar_pts": AT_LEAST_0,
    },
    "lidarseg": {"filename": FILE},
}

# table -> field -> the table whose token it holds, of the fields that are read
REFERENCES = {
    "calibrated_sensor": {"sensor_token": "sensor"},
    "sample": {"scene_token": "scene"},
    "sample_data": {
        "sample_token": "sample",
        "ego_pose_token": "ego_pose",
        "calibrated_sensor_token": "calibrated_sensor",
        "prev": "sample_data",
    },
    "instance": {"category_token": "category"},
    "sample_annotation": {
        "sample_token": "sample",
        "instance_token": "instance",
        "prev": "sample_annotation",
        "next": "sample_annotation",
    },
    "lidarseg": {"sample_data_token": "sample_data"},
}
