import os
import subprocess
import types
from pathlib import Path

import pytest

from beingvl.errors import InputError
from beingvl.launch.environment import (
    environment_file,
    format_environment,
    remote_environment,
    users_files,
)
from beingvl.launch.start_training import for_remote_shell


def test_what_ranks_need_is_passed_and_nothing_else() -> None:
    given = {
        "PYTHONPATH": "/a:/b",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "BEINGVL_X": "1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "",
        "http_proxy": "http://user:secret@proxy",
        "HTTPS_PROXY": "http://proxy",
        "HF_TOKEN": "secret",
        "WANDB_PROJECT": "p",
        "WANDB_API_KEY": "secret",
        "HOME": "/root",
    }
    passed = remote_environment(given, ())
    assert set(passed) == {
        "PYTHONPATH",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "BEINGVL_X",
        "DS_ACCELERATOR",
        "WANDB_PROJECT",
    }


def test_a_users_file_is_passed_on_with_its_comments_left_out(tmp_path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text("# ours\n\nNCCL_DEBUG = INFO\nMINE=a=b\n")
    assert remote_environment({"NCCL_DEBUG": "WARN"}, [path]) == {
        "NCCL_DEBUG": "INFO",
        "MINE": "a=b",
    }
    path.write_text("A=1\nexport B=2\n")
    with pytest.raises(
        InputError, match=r"\.deepspeed_env, line 2: 'export B' is not a variable's name"
    ):
        remote_environment({}, [path])


def test_the_users_files_are_read_in_deepspeeds_order(tmp_path, monkeypatch) -> None:
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".deepspeed_env").write_text(f"WHO={name}\n{name.upper()}=1\n")
    (tmp_path / "named").write_text("NAMED=1\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "named"))
    assert remote_environment({}, users_files()) == {
        "WHO": "here",
        "HOME": "1",
        "HERE": "1",
        "NAMED": "1",
    }


def test_a_value_of_several_lines_is_refused() -> None:
    with pytest.raises(InputError, match="NCCL_X has several lines"):
        remote_environment({"NCCL_X": "a\nb"}, ())


def test_deepspeeds_reader_and_a_shell_give_every_value_back(tmp_path) -> None:
    """The way of a value: our file, DeepSpeed's reader and quoting, the remote shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    values = {
        "A": "plain",
        "B": "two words",
        "C": 'a "quoted" one',
        "D": "$HOME `date` $(date)",
        "E": "back\\slash",
        "F": "a=b;c&d|e'f",
    }
    runner = PDSHRunner(types.SimpleNamespace(user_args=[], user_script="x"), "")
    for line in format_environment(values).splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    shown = subprocess.run(
        ["bash", "-c", exports + "env -0"], capture_output=True, check=True
    ).stdout.decode()
    found = dict(entry.split("=", 1) for entry in shown.split("\0") if "=" in entry)
    assert {name: found[name] for name in values} == values


def test_the_file_is_there_while_the_launcher_runs_and_everything_is_restored(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("DS_ENV_FILE", str(users := tmp_path / "users"))
    users.write_text("A=1\n")
    environment = {"NCCL_DEBUG": "INFO", "HOME": "/root"}
    with pytest.raises(KeyError), environment_file(tmp_path, environment) as given:
        path = Path(given["DS_ENV_FILE"])
        assert path.read_text() == "A=1\nNCCL_DEBUG=INFO\n" and path.parent == tmp_path
        assert {**given, "DS_ENV_FILE": ""} == {**environment, "DS_ENV_FILE": ""}
        raise KeyError
    assert os.environ["DS_ENV_FILE"] == str(users) and users.read_text() == "A=1\n"
    assert not path.exists()


def test_the_trainers_words_come_back_behind_deepspeeds_quoting_and_a_shell() -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    words = [
        "--set",
        'beingvl.mixture={"a":0.7,"b":0.3}',
        "two words",
        'a "quoted" $HOME `date` \\ one',
        "a;b",
        "it's",
        "$HOME",
        "",
    ]
    runner = PDSHRunner(
        types.SimpleNamespace(
            user_args=[for_remote_shell(word) for word in words], user_script="x"
        ),
        "",
    )
    shown = subprocess.run(
        ["bash", "-c", "printf '%s\\0' " + " ".join(runner.user_arguments)],
        capture_output=True,
        check=True,
    )
    assert shown.stdout.decode().split("\0")[:-1] == words
