"""The exception for wrong input: one sentence with cause and remedy, exit code 2."""

import errno
import math

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


class InputError(ValueError):
    """Wrong input. The message says where, what was found, what was expected and what to do."""


def is_out_of_files(error: BaseException) -> bool:
    """Whether opening failed only because too many files are open, not because of the file."""
    return isinstance(error, OSError) and error.errno in TOO_MANY_FILES


def check_at_least(least: int, **options: float | None) -> None:
    """Raises InputError for the first option that is smaller, NaN or infinite. Options have their
    command-line names; None means that an option is not given.
    """
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} is {value}, expected at least {least}")
