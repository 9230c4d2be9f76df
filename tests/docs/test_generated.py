"""What the pages take from the code is up to date."""

from tests.docs.generate import COMMAND_LINE, command_line, keys_in_page, keys_table

ANEW = "write it anew: python -m tests.docs.generate"


def test_the_command_line() -> None:
    assert COMMAND_LINE.read_text() == command_line(), ANEW


def test_the_keys_of_a_stage() -> None:
    assert keys_in_page() == keys_table(), ANEW
