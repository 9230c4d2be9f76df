"""What ranks decide together, with threads in place of ranks."""

import threading

import pytest

from beingvl.artefact.request import Request
from beingvl.errors import InputError
from beingvl.train.agreement import newest_checkpoint, refuse_different_inputs
from beingvl.train.failures import TrainingError
from tests.train.test_checkpoint import meet, write


def test_all_ranks_take_the_newest_checkpoint_that_any_of_them_sees(tmp_path) -> None:
    """Rank 0 sees an older listing for a while, rank 1 none at all: the run must not go back to
    what they see, or begin anew.
    """
    views = [tmp_path / name for name in ("a", "b", "c")]
    for view, steps in zip(views, ([1, 2], [], [1, 2, 3]), strict=True):
        for step in steps:
            write(view, step, [])

    def late(rank, gather):
        if rank < 2:
            threading.Timer(0.5, lambda: write(views[rank], 3, [])).start()
        return newest_checkpoint(views[rank], gather, 40).name

    assert meet(3, late) == ["step-00000003"] * 3
    write(views[1], 1, [])
    assert (
        meet(
            3,
            lambda rank, gather: newest_checkpoint(views[rank], gather, 0, before_step=2).name,
        )
        == ["step-00000001"] * 3
    )
    assert meet(2, lambda rank, gather: newest_checkpoint(tmp_path / "none", gather, 0)) == [
        None,
        None,
    ]


def test_ranks_that_never_see_it_are_named_on_all_ranks(tmp_path) -> None:
    write(tmp_path / "0", 1, [])
    errors = meet(3, lambda rank, gather: newest_checkpoint(tmp_path / str(rank), gather, 0.6))
    assert all(isinstance(error, TrainingError) for error in errors)
    assert {str(error).partition(" cannot see ")[0] for error in errors} == {"rank 1, 2"}
    assert all(
        "which rank 0 sees; all hosts need the same output folder" in str(error) for error in errors
    )


def test_the_first_rank_that_was_given_something_else_is_named() -> None:
    same = Request({"seed": 0, "shards": "a"})
    refuse_different_inputs(same, lambda value: [value, dict(same)])
    others = [same, {**same, "shards": "b"}, {"seed": 1}]
    with pytest.raises(
        InputError,
        match=r"rank 2 has .* than rank 0: different shards \(found 'b', asked for 'a'\)",
    ):
        refuse_different_inputs(same, lambda value: [value, *others])
