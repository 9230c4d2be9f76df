import itertools
import sys

from beingvl.artefact.progress import progress


def test_a_log_gets_a_line_every_half_minute_and_short_work_none(capsys, monkeypatch) -> None:
    assert list(progress([1, 2], name="short", unit="image")) == [1, 2]
    assert capsys.readouterr().err == ""
    seconds = itertools.count(step=20)
    monkeypatch.setattr("tqdm.std.time", lambda: next(seconds))
    with progress(name="long", unit="image", total=100) as bar:
        for _ in range(10):
            bar.update(10)
            bar.set_postfix(psnr=1)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 10
    assert all(line.startswith("long: ") and " of 100 image in " in line for line in lines)


def test_a_notebook_gets_a_bar(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert list(progress([1, 2], name="short", unit="image")) == [1, 2]
    assert "short: 100%" in capsys.readouterr().err
