import json

from beingvl.commands.main import main


def row(step: int, **more) -> dict:
    values = {
        "loss": 3 / step,
        "loss/kind/text": 2 / step,
        "gradient_norm": 1.0,
        "learning_rate": 0.1,
        "tokens": 10,
    }
    values |= {
        "tokens_per_second": 5.0,
        "peak_memory_bytes": 10**9,
        "mfu": 0.25,
        "skipped": 0,
        "spike": 0,
        "seconds_forward": 1.5,
    }
    return {"step": step, **values, **more}


def test_a_stage_becomes_one_page(tmp_path, capsys) -> None:
    rows = [row(1), row(2), row(3, skipped=1, sample_ids=["sample-<7>"])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    (tmp_path / "validation.jsonl").write_text(
        json.dumps({"step": 2, "validation/loss": 1.0}) + "\n"
    )
    (tmp_path / "plan.txt").write_text("rule  trained\n")
    assert main(["report", "train", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "sample-&lt;7&gt;" in html and "25.0%" in html and "rule  trained" in html
    assert html.count("<svg") == 6 and "<script" not in html and "http" not in html
    assert "4.5 s" in html


def test_a_folder_without_metrics_is_refused(tmp_path, capsys) -> None:
    assert main(["report", "train", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", "train", str(tmp_path)]) == 2
    assert "holds no step yet" in capsys.readouterr().err


def test_a_line_that_a_crash_truncated_is_left_out(tmp_path, capsys) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:40])
    assert main(["report", "train", str(tmp_path)]) == 0
    assert "1 steps" in capsys.readouterr().out
