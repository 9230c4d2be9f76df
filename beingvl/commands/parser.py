"""How every command reads its options: no abbreviations, and a mistake is one sentence."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

NO_DEFAULT = (None, True, False, argparse.SUPPRESS)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default == [] or any(action.default is none for none in NO_DEFAULT)
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Formatter, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str], namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """A misspelt option is named before the required one that is missing because of it."""
        if not self._subparsers:  # which do the same for theirs
            known = self._option_string_actions
            own = args[: args.index("--")] if "--" in args else args
            for word in own:
                option = word.partition("=")[0]
                if option.startswith("--") and option not in known:
                    near = difflib.get_close_matches(option, known, n=1)
                    self.error(
                        f"no option {option}" + (f"; did you mean {near[0]}?" if near else "")
                    )
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` lists the options)\n")
