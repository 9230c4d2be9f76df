from beingvl import cli
from tests.data.test_parts import inputs  # noqa: F401  (a fixture)
from tests.tiny import LAYOUT, write_shards


def test_the_page_counts_what_is_there_and_what_never_occurs(tmp_path, capsys) -> None:
    write_shards(tmp_path / "shards", num_samples=3)
    assert cli.main(["report", "data", str(tmp_path / "shards"), "--output_path", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "foundation" in page and "% full" in page and "<script" not in page and "http" not in page
    assert f"<td>all new rows</td><td>{LAYOUT.num_visual}</td>" in page
    assert cli.main(["report", "data", str(tmp_path / "shards"), "--num_examples", "0"]) == 2
    assert "--num_examples is 0" in capsys.readouterr().err


def test_examples_have_their_text_and_images(inputs, tmp_path) -> None:  # noqa: F811
    page = tmp_path / "page.html"
    paths = [f"--vq_path={inputs}/vqgan", f"--vbpe_path={inputs}/vbpe.json", f"--model_path={inputs}/base"]
    assert cli.main(["report", "data", str(inputs / "build-shards"), f"--output_path={page}", *paths]) == 0
    text = page.read_text()
    assert text.count("data:image/png") == 6 and "hi" in text and "yes" in text
