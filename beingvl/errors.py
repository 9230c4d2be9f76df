"""The exception for what a user gave us: one sentence with cause and remedy, exit code 2."""


class InputError(ValueError):
    """Wrong input. The message names the file, what was found, what was expected and what to do."""
