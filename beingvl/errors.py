"""The exception for what a user gave us: one sentence with cause and remedy, exit code 2."""

import errno
import math

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


class InputError(ValueError):
    """Wrong input. The message names the file, what was found, what was expected and what to do."""


def is_out_of_files(error: BaseException) -> bool:
    """Whether too many files are open, which says nothing about the one that was to be opened."""
    return isinstance(error, OSError) and error.errno in TOO_MANY_FILES


def check_at_least(least: int, **options: float | None) -> None:
    """Raises InputError for the first option, named as on the command line, that is smaller, NaN or
    infinite. None stands for one that is not given.
    """
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name} is {value}, expected at least {least}")
