"""Commands in this process, with their options as keywords: `beingvl("verify", folder)`."""

from __future__ import annotations

from beingvl.commands.main import main


def argv(command: str, *paths: object, **options: object) -> list[str]:
    """The words of a command line. An option that is True is a switch, one that is a list takes
    several words, and one that is None or False is left out.
    """
    words = [command, *map(str, paths)]
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def beingvl(command: str, *paths: object, **options: object) -> int:
    """The exit code of a command."""
    return main(argv(command, *paths, **options))
