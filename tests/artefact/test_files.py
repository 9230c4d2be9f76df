import pytest

from beingvl.artefact import files
from beingvl.errors import InputError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    files.write_atomically(path, "old")
    monkeypatch.setattr(
        files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../../x", "..", ".", "", "a\0b", "\ud800", "out", "out/x", "up/x"],
)
def test_no_name_leads_out_of_its_folder(tmp_path, name) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "folder-beside").mkdir()
    (folder / "out").symlink_to(tmp_path / "folder-beside")
    (folder / "up").symlink_to("..")
    with pytest.raises(InputError, match=r"names the file|leads out of") as raised:
        files.path_inside(folder, name)
    assert "\n" not in str(raised.value)


def test_names_inside_are_taken_also_through_links_and_from_a_download_cache(tmp_path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    (folder / "vqgan").mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "beef").write_text("weights")
    (folder / "vqgan" / "x").symlink_to("../../../blobs/beef")
    (folder / "link").symlink_to("vqgan")
    (tmp_path / "elsewhere").symlink_to(folder)
    for place, name in [
        (folder, "vqgan/x"),
        (folder / "vqgan", "x"),
        (folder, "link/x"),
        (folder, "vqgan/not there yet"),
        (tmp_path / "elsewhere", "..x"),
    ]:
        assert files.path_inside(place, name) == place / name
    (folder / "y").symlink_to("../../../elsewhere/../escaped")
    with pytest.raises(InputError, match="leads out of"):
        files.path_inside(folder, "y")
