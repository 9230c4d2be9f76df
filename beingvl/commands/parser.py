"""The option parser of all commands: no abbreviations, and errors of one sentence."""

from __future__ import annotations

import argparse
import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from beingvl.errors import InputError

NO_DEFAULT = (None, True, False, argparse.SUPPRESS)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults if there are any, and keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default == [] or any(action.default is none for none in NO_DEFAULT)
        return action.help if has_none else super()._get_help_string(action)


# Each thing has one option name in all commands; Being-VL-0.5's and DeepSpeed's names work, too.
OTHER_NAMES = {
    "--model_path": "--model",
    "--output_path": "--output",
    "--output_dir": "--output",
    "--vbpe_path": "--vbpe",
    "--vq_codes": "--codes",
    "--data_path": "--codes",
    "--vq_path": "--vqgan",
    "--vq": "--vqgan",
    "--being_vq_path": "--vqgan",
    "--deepspeed_config": "--config",
    "--stage": "--config",
    "--torch_dtype": "--dtype",
}


@dataclass(frozen=True)
class Input:
    """The `type` of an option that names an input: its Python type `form`, and the `kind` of
    finished artefact or "vbpe.json", or "" for any file or folder. `config_of`: what a folder is
    that holds a config.json.
    """

    kind: str = ""
    form: type[Path] | type[str] = Path
    config_of: str = ""

    def __call__(self, text: str) -> Path | str:
        return self.form(text)

    def look_at(self, given: Path | str) -> None:
        """Raises OSError or InputError if it is missing, or the wrong kind."""
        if not self.kind:
            if ":/" not in str(given) and not glob.has_magic(str(given)):
                os.stat(given)
            if self.config_of and not os.path.isfile(os.path.join(given, "config.json")):
                raise InputError(f"{given} has no config.json: it is not {self.config_of}")
            return
        folder = Path(given)
        # Imported here, so that --help is instant.
        if self.kind == "vbpe.json":
            from beingvl.vbpe.visual_bpe import VisualBPE

            os.stat(folder)
            if folder.suffix != ".pkl":
                VisualBPE.load(folder)
            return
        from beingvl.artefact.manifest import read_manifest
        from beingvl.model.start_model import find_start_model
        from beingvl.vocab import VocabLayout

        if self.kind == "model":
            folder = find_start_model(folder)
            VocabLayout.load(folder)
        read_manifest(folder, self.kind)


FILE, PLACE = Input(), Input(form=str)  # a path; a path, a URL or a pattern
VQGAN = Input(config_of="a VQ-GAN folder; make one with `beingvl train-vq` or download one")
VBPE = Input("vbpe.json")  # a folder that holds one, or a published pickle


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Formatter, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Report a misspelt option before the required one that is missing because of it."""
        if not self._subparsers:  # subparsers check their own options
            end = args.index("--") if "--" in args else len(args)
            args = [*map(self._known, args[:end]), *args[end:]]
        return super().parse_known_args(args, namespace)

    def look_at_inputs(self, args: argparse.Namespace) -> None:
        """Report a wrong path before the step's libraries are loaded, which takes seconds."""
        for action in self._actions:
            given = getattr(args, action.dest, None)
            if isinstance(action, argparse._SubParsersAction):
                action.choices[str(given)].look_at_inputs(args)
            if isinstance(action.type, Input):
                for one in given if isinstance(given, list) else filter(None, [given]):
                    action.type.look_at(one)

    def _known(self, word: str) -> str:
        """The word, with its option renamed to this command's name for it."""
        known = self._option_string_actions
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in known:
            return word
        if OTHER_NAMES.get(option) in known:
            return OTHER_NAMES[option] + equals + value
        others = [name for name, renamed in OTHER_NAMES.items() if renamed in known]
        near = difflib.get_close_matches(option, [*known, *others], n=1, cutoff=0.75)
        hint = f"; did you mean {OTHER_NAMES.get(near[0], near[0])}?" if near else ""
        self.error(f"no option {option}{hint}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` lists the options)\n")
