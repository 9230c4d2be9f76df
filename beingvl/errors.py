"""The one exception for what a user gave us: a sentence with cause and remedy, shown without a
traceback, exit code 2.
"""


class InputError(ValueError):
    """Wrong input. The message names the file, what was found, what was expected and what to do."""
