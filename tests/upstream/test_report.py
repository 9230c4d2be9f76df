"""Every row of docs/how-to/coming-from-being-vl-0.5.md is executed, and has a result."""

import pytest

from tests.upstream.calls import CHECKS, ONE_SENTENCE, WORD_FOR_WORD
from tests.upstream.report import rows_of_page
from tests.upstream.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("upstream"))


def test_the_page_has_every_row_once() -> None:
    assert set(rows_of_page()) == set(CHECKS)


@pytest.mark.parametrize(("old", "new"), rows_of_page().items(), ids=list(rows_of_page()))
def test_row(world, old, new) -> None:
    is_same = new.startswith(("same", "as written"))
    assert CHECKS[old](world) in ([WORD_FOR_WORD] if is_same else [WORD_FOR_WORD, ONE_SENTENCE])
