"""Keys and passwords of a user's shell stay there; files are readable for whom they should be."""

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beingvl.artefact.files import bare
from beingvl.artefact.manifest import write_manifest
from beingvl.artefact.owner import OWNER, owned
from beingvl.commands import main as cli
from beingvl.errors import InputError
from beingvl.launch import check_hosts
from beingvl.launch.environment import (
    DEEPSPEEDS_PREFIXES,
    environment_file,
    remote_environment,
    shown,
)
from beingvl.launch.hostfile import Host
from beingvl.launch.start_training import Run
from beingvl.train.probe import PROBE_FILE, Probe, save_probe
from tests.model.small_models import write_vqgan

PACKAGE = Path(cli.__file__).parents[1]
SECRETS = {
    "WANDB_API_KEY": "s3cret",
    "BEINGVL_TOKEN": "s3cret",
    "NCCL_SECRET": "s3cret",
    "BEINGVL_PASSWORD": "s3cret",
    "WANDB_BASE_URL": "https://me:s3cret@wandb.example",
    "BEINGVL_MIRROR": "https://s3cret@mirror.example/simple",
}
OPEN = {
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_DEBUG": "INFO",
    "WANDB_ENTITY": "https://wandb.example/a@b",
}


def test_secrets_of_the_shell_do_not_travel() -> None:
    assert remote_environment(SECRETS | OPEN, ()) == OPEN


def test_deepspeed_finds_no_secret_that_it_would_pass_by_itself(monkeypatch) -> None:
    from deepspeed.launcher.runner import EXPORT_ENVS

    assert set(EXPORT_ENVS) < set(DEEPSPEEDS_PREFIXES)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@host")
    monkeypatch.setenv("MLFLOW_RUN", "1")
    hosts = [Host("one", 1), Host("two", 1)]
    passed = Run(Path("hostfile"), hosts, "m", [], "10.0.0.1", 29500).environment
    assert "s3cret" not in str(passed.values()) and passed["MLFLOW_RUN"] == "1"


def test_a_secret_that_the_users_file_passes_is_shown_nowhere(tmp_path, monkeypatch) -> None:
    users = tmp_path / "users"
    users.write_text("HF_TOKEN=s3cret\nINDEX=https://me:s3cret@host/\nNCCL_DEBUG=INFO\n")
    passed = remote_environment({}, [users])
    assert passed["HF_TOKEN"] == "s3cret"
    lines = ["HF_TOKEN=(not shown)", "INDEX=(not shown)", "NCCL_DEBUG=INFO"]
    assert shown(passed).splitlines() == lines

    asked: list[str] = []
    monkeypatch.setenv("DS_ENV_FILE", str(users))
    monkeypatch.setattr(
        check_hosts,
        "run_on",
        lambda host, command: (
            asked.append(command) or subprocess.CompletedProcess([], 255, "", "silent")
        ),
    )
    check_hosts.check_hosts([Host("one", 1), Host("two", 1)], check_hosts.Wanted(29500))
    assert len(asked) == 2
    assert all("NCCL_DEBUG=INFO" in line and "s3cret" not in line for line in asked)


def test_the_environment_file_is_its_owners_and_does_not_outlive_a_killed_launcher(
    tmp_path,
) -> None:
    with environment_file(tmp_path, {"NCCL_DEBUG": "INFO"}) as given:
        path = Path(given["DS_ENV_FILE"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ended = subprocess.Popen(["true"])
    ended.wait()
    stale, running, elsewhere = (
        tmp_path / name
        for name in (
            f"{path.stem}.{ended.pid}",
            f"{path.stem}.{os.getppid()}",
            f".deepspeed_env.another-host.{ended.pid}",
        )
    )
    for other in (stale, running, elsewhere):
        other.write_text("A=1\n")
    with environment_file(tmp_path, {}):
        assert not stale.exists() and running.exists() and elsewhere.exists()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://user:p@ss@host/x", "https://host/x"),
        ("https://h?token=a@b", "https://h"),
        ("HTTPS://h/x?sig=1", "HTTPS://h/x"),
        ("s3://bucket/a@b?.json", "s3://bucket/a@b?.json"),
    ],
)
def test_an_address_is_shown_without_its_secrets(address: str, shown: str) -> None:
    assert bare(address) == shown


def test_a_signed_address_is_kept_in_no_file(tmp_path, monkeypatch) -> None:
    words = ["beingvl", "tokenize", "--json_path=https://me:SECRET@host/a.json?sig=SECRET&x"]
    words += ["https://host/b.tar?SECRET", "s3://bucket/a?.json"]
    monkeypatch.setattr("sys.argv", words)
    with owned(tmp_path / "out"):
        kept = [path.read_text() for path in (tmp_path / "out" / OWNER).iterdir()]
        write_manifest(tmp_path / "out", "tokens", {}, {})
    kept.append((tmp_path / "out" / "manifest.json").read_text())
    for text in kept:
        assert "SECRET" not in text
        assert "--json_path=https://host/a.json https://host/b.tar 's3://bucket/a?.json'" in text


def test_a_traceback_is_written_to_a_file_that_nobody_could_have_made_before(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (victim := tmp_path / "victim").write_text("mine")
    (tmp_path / f"beingvl-verify-{os.getpid()}.traceback.txt").symlink_to(victim)
    monkeypatch.setattr("beingvl.artefact.verify.verify_folder", lambda path: 1 / 0)
    assert cli.main(["verify", str(tmp_path)]) == 1
    saved = Path(capsys.readouterr().err.split("the traceback is in ")[1].split(" ")[0])
    assert "ZeroDivisionError" in saved.read_text() and victim.read_text() == "mine"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_code_of_a_model_folder_is_never_trusted() -> None:
    """Without the argument transformers asks a user at a terminal."""
    places = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                places.append((path.name, said.get("trust_remote_code")))
    assert len(places) >= 6 and {said for _, said in places} == {"False"}, places
    assert "extract_vqgan.py" in dict(places)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_written_files_have_the_mode_that_the_umask_says(tmp_path, umask) -> None:
    before = os.umask(umask)
    try:
        folder = write_vqgan(tmp_path / "vqgan")
        save_probe(
            folder,
            Probe(torch.zeros(3).long(), torch.arange(3), torch.ones(1).long()),
            torch.zeros(1, 9),
        )
    finally:
        os.umask(before)
    assert (folder / PROBE_FILE).is_file()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("name", ["two words", "a;b", "$HOME", "100%h", "it's"])
def test_a_working_folder_that_a_shell_would_read_as_words_is_refused(
    tmp_path, monkeypatch, name
) -> None:
    (folder := tmp_path / name).mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("shutil.which", lambda program, path=None: f"/bin/{program}")
    hosts = [Host("one", 1), Host("two", 1)]
    run = Run(folder / "hostfile", hosts, "m", ["--x"], "10.0.0.1", 29500)
    with pytest.raises(InputError, match=r"which the shells of the other hosts would not take"):
        _ = run.command
    monkeypatch.chdir(tmp_path)
    assert sys.executable and "--force_multi" in run.command
