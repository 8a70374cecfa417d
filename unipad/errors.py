"""What the user can mend, said in one sentence. Without torch, so that processes which only draw need not load it."""


class UserError(Exception):
    """Something the user can mend: the message is one sentence that names the flag or file and the mend."""


def check_choices(**flags):
    """flags: name -> (value, what it may be); None is left out. Raises `UserError`."""
    for name, (value, choices) in flags.items():
        if value is not None and value not in choices:
            raise UserError(f"{_flag(name)} {value} is not known; use {', '.join(map(str, choices))}.")


def check_ranges(args, above_0=(), not_below_0=(), share=()):
    """Names of fields of `args`; None is left out. share: from 0 to below 1. Raises `UserError`."""
    rules = [
        (above_0, lambda value: value > 0, "must be above 0"),
        (not_below_0, lambda value: value >= 0, "must not be below 0"),
        (share, lambda value: 0 <= value < 1, "must be from 0 to below 1"),
    ]
    for names, holds, rule in rules:
        for name in names:
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise UserError(f"{_flag(name)} {value} {rule}.")


def _flag(name):
    return "--" + name.replace("_", "-")
