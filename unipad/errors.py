"""User-facing errors: one sentence, exit code 2. This module does not import torch, so that the processes that
generate the synthetic city start without it."""

import dataclasses
import os
from collections.abc import Sequence
from operator import attrgetter


class UserError(Exception):
    """Something that the user can fix: the message is one sentence that names the flag or file, and the fix."""


def check_choices(**flags):
    """Raises `UserError` for a value that is not allowed. flags: name -> (value, allowed values); None is allowed."""
    for name, (value, choices) in flags.items():
        if value is not None and value not in choices:
            raise UserError(f"{_flag(name)} {value} is not known; use {', '.join(map(str, choices))}.")


def check_ranges(args, above_0: Sequence[str] = (), not_below_0: Sequence[str] = ()):
    """Raises `UserError` unless the fields of `args` with these (dotted) names are in range or None."""
    for name in (*above_0, *not_below_0):
        value = attrgetter(name)(args)
        if value is not None and not (value > 0 if name in above_0 else value >= 0):
            raise UserError(f"{_flag(name)} {value} must {'be above' if name in above_0 else 'not be below'} 0.")


def check_numbers(value, name: str = ""):
    """Refuse numbers that make no sense as a setting: infinite, NaN, or outside 1e-30 to 1e9 in size,
    which leaves room to compute in fp32 and int32. A seed may be any int64.

    value: a number, tuple or dataclass, whose fields are checked recursively; name: of the field, dotted. Raises
    `UserError`.
    """
    if dataclasses.is_dataclass(value):
        for field, inner in vars(value).items():
            check_numbers(inner, f"{name}.{field}".lstrip("."))
    elif isinstance(value, tuple):
        for inner in value:
            check_numbers(inner, name)
    elif isinstance(value, float) and not (value == 0 or 1e-30 < abs(value) < 1e9):  # False for NaN too
        raise UserError(f"{_flag(name)} {value} is out of range; give a number from 1e-30 to 1e9, or 0.")
    elif isinstance(value, int) and abs(value) > (most := 2**63 - 1 if name == "seed" else 10**9):
        raise UserError(f"{_flag(name)} {value} is too large; use at most {most}.")


def check_memory(needed: float, what: str):
    """Raises `UserError` if this machine has less memory than `needed` bytes.

    what: the beginning of the message: what needs the memory, and the flag that sets it.
    """
    if not hasattr(os, "sysconf"):  # Windows
        return
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > has:
        raise UserError(f"{what} takes {needed / 2**30:.0f} GB, and this machine has {has / 2**30:.0f} GB.")


def _flag(name):
    """The flag of a dotted field, written without the prefix "recipe."."""
    return "--" + name.removeprefix("recipe.").replace("_", "-")
