"""User-facing errors: one sentence, exit code 2. Free of torch, which processes that only draw need not load."""

from operator import attrgetter


class UserError(Exception):
    """Something that the user can fix: the message is one sentence that names the flag or file, and the fix."""


def check_choices(**flags):
    """flags: name -> (value, allowed values); None is skipped. Raises `UserError`."""
    for name, (value, choices) in flags.items():
        if value is not None and value not in choices:
            raise UserError(f"{_flag(name)} {value} is not known; use {', '.join(map(str, choices))}.")


def check_ranges(args, above_0=(), not_below_0=(), fraction=()):
    """Names of fields of `args`, nested ones by their path; None is skipped. Raises `UserError`.

    fraction: from 0 to below 1.
    """
    rules = [
        (above_0, lambda value: value > 0, "must be above 0"),
        (not_below_0, lambda value: value >= 0, "must not be below 0"),
        (fraction, lambda value: 0 <= value < 1, "must be from 0 to below 1"),
    ]
    for names, holds, rule in rules:
        for name in names:
            value = attrgetter(name)(args)
            if value is not None and not holds(value):
                raise UserError(f"{_flag(name)} {value} {rule}.")


def _flag(name):
    return "--" + name.removeprefix("recipe.").replace("_", "-")
