import ast
import errno
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import beingvl
from beingvl.artefact.manifest import write_manifest
from beingvl.commands import encode_images, tokenize
from beingvl.commands import main as cli
from beingvl.commands.options import NOT_FOR_THE_STEP
from beingvl.commands.parser import OTHER_NAMES, Parser
from beingvl.vocab import LAYOUT_FILE, VocabLayout
from tests.programs import run_program

MOST_SECONDS = 0.25  # of the processor, so that a busy machine does not matter


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_is_instant_and_imports_nothing_heavy(command: str) -> None:
    seconds = []
    while not seconds or (min(seconds) > MOST_SECONDS and len(seconds) < 5):
        before = os.times()
        done = run_program("light_help", *command.split(), is_measured=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert done.returncode == 0, done.stderr
        assert f"usage: beingvl {command or 'COMMAND'}" in done.stdout
    assert min(seconds) <= MOST_SECONDS, seconds


def test_overview_and_version(capsys) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["-V"]) == cli.main(["--version"]) == 0
    with pytest.raises(SystemExit, match="0"):
        cli.main(["help", "report", "vbpe"])
    assert "usage: beingvl report vbpe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("train --modle base", "beingvl train: error: no option --modle; did you mean --model?"),
        ("tokenize --vqgan v", "beingvl tokenize: error: no option --vqgan (`beingvl tokenize"),
        ("report data --exmples=3", "beingvl report data: error: no option --exmples; did you"),
        ("train --mod base", "beingvl train: error: no option --mod;"),  # no abbreviations
        ("launch --hostfile h -- --dta d", "beingvl train: error: no option --dta; did you mean"),
        ("verify", "beingvl verify: error: the following arguments are required: paths"),
    ],
)
def test_a_wrong_option_is_one_sentence(words: str, found: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    error = capsys.readouterr().err
    assert error.startswith(found) and error.count("\n") == 1, error


def test_unknown_command_suggests_the_near_one(capsys) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_dashes_and_underscores_are_the_same() -> None:
    assert cli._underscored("--like-this=a-b") == "--like_this=a-b"
    assert cli._underscored("--like-this") == "--like_this"
    assert cli._underscored("a-b") == "a-b"


def test_each_thing_has_one_name_and_others_are_known() -> None:
    """Names of Being-VL-0.5 and of earlier versions; help shows the one name alone."""
    parser = Parser(prog="beingvl tokenize")
    tokenize.add_arguments(parser)
    old = "--json_path r --output_dir o --model_path m --vbpe_path=v --vq_codes c --torch_dtype"
    new = "--json_path r --output o --model m --vbpe=v --codes c --dtype"
    found = [vars(parser.parse_args([*words.split(), "bfloat16"])) for words in (old, new)]
    assert found[0] == found[1] and found[0]["model_path"] == Path("m")
    assert not any(name in parser.format_help() for name in OTHER_NAMES)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("beingvl tr", ["train", "train-vbpe", "train-vq"]),
        ("beingvl train --carry", ["--carry_moments"]),
        ("beingvl report data --vq", ["--vqgan"]),
    ],
)
def test_the_shell_completes_commands_and_options(line: str, found: list[str], tmp_path) -> None:
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, "-m", "beingvl"]
    subprocess.run(command, env={**os.environ, **asked}, check=True)
    assert sorted(word.strip() for word in answer.read_text().split("\n")) == found


def test_every_option_is_an_argument_of_the_commands_step() -> None:
    """Of each `step(**options_of(args, ...))` that a command's `run` ends in."""
    compared = 0
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"beingvl.commands.{path.stem}")
        if not hasattr(module, "add_arguments"):
            continue
        tree = ast.parse(inspect.getsource(module.run))
        homes = {
            name.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            spread = [word.value for word in call.keywords if word.arg is None]
            if not spread or not ast.unparse(spread[0]).startswith("options_of(args"):
                continue
            parser = Parser(prog=path.stem)
            module.add_arguments(parser)
            left_out = {ast.literal_eval(word) for word in spread[0].args[1:]}
            options = {action.dest for action in parser._actions} - left_out - {"help"}
            name = ast.unparse(call.func)
            step = getattr(importlib.import_module(homes[name]), name)
            unknown = options - set(inspect.signature(step).parameters) - {*NOT_FOR_THE_STEP}
            assert not unknown, f"{path.stem}: {name} does not take {unknown}"
            compared += 1
    assert compared >= 10


def test_images_are_encoded_in_the_same_dtype_by_default() -> None:
    for module, name in ((encode_images, "dtype"), (tokenize, "torch_dtype")):
        parser = Parser()
        module.add_arguments(parser)
        assert parser.get_default(name) == "auto"
        step = getattr(beingvl, module.__name__.rpartition(".")[2])
        assert inspect.signature(step).parameters[name].default == "auto"


def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path, capsys) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "manifest.json" in error and "Traceback" not in error
    with pytest.raises(ValueError, match="incomplete"):
        cli.main(["verify", str(tmp_path), "--debug"])


def test_a_wrong_path_is_named_with_its_option(tmp_path, capsys) -> None:
    words = [
        "tokenize",
        "--mode=pt",
        f"--json_path={tmp_path / 'none.json'}",
        f"--output_dir={tmp_path}",
        "--dataset_name=a",
    ]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / LAYOUT_FILE).write_text(json.dumps(VocabLayout(100, 8, 4, 1, 2).to_dict()))
    write_manifest(tmp_path / "base", "model", {}, {})
    assert cli.main([*words, f"--model_path={tmp_path / 'base'}"]) == 2
    assert (
        f"error: --json_path {tmp_path / 'none.json'}: No such file or directory"
        in capsys.readouterr().err
    )


def test_a_folder_in_the_place_of_an_output_is_named(tmp_path, capsys) -> None:
    row = dict.fromkeys(
        [
            "step",
            "loss",
            "tokens",
            "tokens_per_second",
            "mfu",
            "peak_memory_bytes",
            "skipped",
            "spike",
        ],
        1,
    )
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (page := tmp_path / "page").mkdir()
    for words in ([f"--output_path={page}"], ["--output_path", str(page)]):
        assert cli.main(["report", "train", str(tmp_path), *words]) == 2
        assert f"error: --output_path {page}: Is a directory" in capsys.readouterr().err
    assert cli.main(["report", "run", str(tmp_path / "none")]) == 2
    assert "--" not in capsys.readouterr().err


def test_a_default_of_0_is_shown(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train-vq", "--help"])
    assert "(default: 0)" in capsys.readouterr().out


def test_a_defect_keeps_its_traceback_in_a_file(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("beingvl.artefact.verify.verify_folder", lambda path: 1 / 0)
    assert cli.main(["verify", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    saved = error.split("the traceback is in ")[1].split(" ")[0]
    assert "ZeroDivisionError" in Path(saved).read_text()


def test_a_failing_or_full_disk_is_a_sentence_and_any_other_error_of_the_system_a_defect(
    tmp_path, capsys, monkeypatch
) -> None:
    for number, code, message in (
        (errno.EBADF, 1, "looks like a bug"),
        (errno.EIO, 2, "check the disk"),
        (errno.ENOSPC, 2, "make room"),
        (errno.EROFS, 2, "check the disk"),
        (errno.ENOLCK, 2, "check the disk"),
        (errno.ENOSYS, 2, "check the disk"),
        (errno.EOPNOTSUPP, 2, "check the disk"),
        (errno.EMFILE, 2, "allow more open files (`ulimit -n 65536`)"),
    ):

        def fail(path, number=number):
            raise OSError(number, os.strerror(number), "x.bin")

        monkeypatch.setattr("beingvl.artefact.verify.verify_folder", fail)
        assert cli.main(["verify", str(tmp_path)]) == code
        assert message in capsys.readouterr().err
