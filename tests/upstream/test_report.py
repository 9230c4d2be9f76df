"""Every row of docs/Coming-from-Being-VL-0.5.md is executed, and has a result."""

import pytest

from tests.upstream.calls import CHECKS, ONE_SENTENCE, WORD_FOR_WORD
from tests.upstream.report import rows_of_page
from tests.upstream.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("upstream"))


def test_the_page_has_every_row_once() -> None:
    rows = rows_of_page()
    assert len(rows) == len(set(rows)) and set(rows) == set(CHECKS)


@pytest.mark.parametrize("row", rows_of_page())
def test_row(world, row) -> None:
    assert CHECKS[row](world) in (WORD_FOR_WORD, ONE_SENTENCE)
