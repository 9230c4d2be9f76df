import sys
import time

from beingvl.artefact import progress as module
from beingvl.artefact.progress import progress


def test_a_log_gets_lines_also_in_the_middle_of_an_item_and_short_work_none(
    capfd, monkeypatch
) -> None:
    assert list(progress([1, 2], name="short", unit="image")) == [1, 2]
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(module, "LOG_SECONDS", 0.2)
    with progress(name="long", unit="image", total=100) as bar:
        bar.update(10)
        bar.set_postfix(psnr=1)
        shown, started = "", time.monotonic()
        while shown.count("\n") < 2 and time.monotonic() - started < 60:
            time.sleep(0.05)
            shown += capfd.readouterr().err
    most = 2 + (time.monotonic() - started) / module.LOG_SECONDS
    lines = (shown + capfd.readouterr().err).splitlines()
    assert 2 <= len(lines) <= most
    for line in lines:
        assert line.startswith("long: 10 of 100 images in 00:0") and " left, " in line
        assert "image/s, psnr=1" in line
    for _ in progress(range(2), name="items", unit="image"):
        time.sleep(0.5)
    counted = capfd.readouterr().err
    assert "items: 0 of 2 images in 00:00\n" in counted and "items: 1 of 2 images" in counted
    time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_notebook_gets_a_bar(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert list(progress([1, 2], name="short", unit="image")) == [1, 2]
    assert "short: 100%" in capsys.readouterr().err
