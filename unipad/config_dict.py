"""Recipes and flags as dictionaries that JSON and `torch.load(weights_only=True)` read, and back."""

import dataclasses
import json
import types
import typing
from pathlib import Path


def to_dict(config) -> dict:
    """A dataclass as JSON-able values; `from_dict` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


# Settings that older runs lack; they ran with what is the default now
ADDED_SETTINGS = {"sources", "patch", "patch_step", "photometric_weight", "occupancy_weight", "occupancy_window"}
ADDED_SETTINGS |= {"features", "feature_channels", "features_weight", "features_loss"}


def from_dict(kind, value, name=""):
    """The inverse of `to_dict`: JSON-able `value` as a `kind`: a dataclass, the type of a field, or a union of these.

    Raises TypeError if the fields are not exactly those of a dataclass of `kind`, `ADDED_SETTINGS` aside, or, with
    the dotted name of the field, where a value is not of its field's type.

    name: dotted name of the field that has the value, for messages; "" for a whole config.
    """
    if isinstance(value, dict):
        for choice in filter(dataclasses.is_dataclass, _choices(kind)):
            if value.keys() | ADDED_SETTINGS & choice.__dataclass_fields__.keys() == choice.__dataclass_fields__.keys():
                hints = typing.get_type_hints(choice)
                names = {field: f"{name}.{field}".lstrip(".") for field in hints}
                return choice(**{field: from_dict(hints[field], value[field], names[field]) for field in value})
        raise TypeError(f"no {kind} has the fields {', '.join(map(str, value))}")
    for choice in _choices(kind):
        if (result := _as(choice, value, name)) is not _NO_MATCH:
            return result
    raise TypeError(f"{name} is {str(value)[:50]!r}")


_NO_MATCH = object()  # unlike None, never the value of a field


def _choices(kind):
    """The members of a union type, or (kind,)."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _as(kind, value, name):
    """The JSON value as an instance of `kind`, neither a dataclass nor a union; `_NO_MATCH` if it is not one."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value if value in inner else _NO_MATCH
    if origin is tuple:
        if not isinstance(value, list):
            return _NO_MATCH
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        if len(kinds) != len(value):
            return _NO_MATCH
        return tuple(from_dict(part, item, name) for part, item in zip(kinds, value, strict=True))
    if kind is Path:
        return Path(value) if isinstance(value, str) else _NO_MATCH
    if kind is float:
        return value if type(value) in (float, int) else _NO_MATCH
    return value if type(value) is kind else _NO_MATCH
