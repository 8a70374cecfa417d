"""User-facing errors: one sentence, exit code 2. Does not import torch, so that plotting processes start without it."""

from collections.abc import Sequence
from operator import attrgetter


class UserError(Exception):
    """Something that the user can fix: the message is one sentence that names the flag or file, and the fix."""


def check_choices(**flags):
    """flags: name -> (value, allowed values); None is skipped. Raises `UserError`."""
    for name, (value, choices) in flags.items():
        if value is not None and value not in choices:
            raise UserError(f"{_flag(name)} {value} is not known; use {', '.join(map(str, choices))}.")


def check_ranges(args, above_0: Sequence[str] = (), not_below_0: Sequence[str] = ()):
    """Names of fields of `args`, nested ones by their path; None is skipped. Raises `UserError`."""
    for name in (*above_0, *not_below_0):
        value = attrgetter(name)(args)
        if value is not None and not (value > 0 if name in above_0 else value >= 0):
            raise UserError(f"{_flag(name)} {value} must {'be above' if name in above_0 else 'not be below'} 0.")


def _flag(name):
    return "--" + name.removeprefix("recipe.").replace("_", "-")
