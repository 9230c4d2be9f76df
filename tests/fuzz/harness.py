"""Mutated inputs by the thousand, in this process, and what must never come of them.

    for number, data in enumerate(mutated(seeds, count=2000, seed=1)):
        path.write_bytes(data)
        outcomes[judged(f"case {number}", lambda: read(path), inside=tmp_path)] += 1

`judged` lets a call return, or refuse its input as a user is told: InputError, or an OSError of a
path. Anything else fails the test: another exception, more than `LIMIT_SECONDS`, a process that is
started, a file that is written, renamed or removed outside `inside`.
"""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from beingvl.commands.main import WRONG_PATH
from beingvl.errors import InputError

LIMIT_SECONDS = 10
LONGEST_MESSAGE = 1500
RETURNED, REFUSED = "returned", "refused"

# ---- mutations ----

ODD_BYTES = (b"\0", b"\xff", b"\n", b"{", b"}", b"[", b'"', b"\x89PNG", b"../", b"9" * 30)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**31), 2**63, 10**30, 1.5, -0.0),
    *(
        float("nan"),
        float("inf"),
        1e308,
        "",
        " ",
        "0",
        "a" * 400,
        "\0",
        "../payload",
        "/etc/passwd",
    ),
    *("a/../../b", "\ud800", "\u202e", "<image>", "blake3:00", "😀", [], {}, [[]], [None]),
)


def mutated(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` variants of some files, by 1 to 4 changes of their bytes each."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            _change_bytes(data, chance)
        yield bytes(data)


def _change_bytes(data: bytearray, chance: random.Random) -> None:
    # most formats say what they are in their first bytes
    end = chance.choice((len(data), min(len(data), 512), min(len(data), 64)))
    at = chance.randrange(end) if end else 0
    length = chance.choice((1, 2, 4, 8, 100, 5000))
    match chance.randrange(7):
        case 0 if data:
            data[at] ^= 1 << chance.randrange(8)
        case 1 if data:
            data[at] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        case 2:
            del data[at : at + length]
        case 3:
            del data[at:]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            data[at:at] = chance.choice(ODD_BYTES)
        case _:
            data[at : at + length] = chance.randbytes(min(length, len(data) - at))


def mutated_values(seeds: Sequence[Any], count: int, seed: int) -> Iterator[Any]:
    """`count` variants of some JSON values, by 1 to 3 changes each: of a value, a key, a place."""
    chance = random.Random(seed)
    for _ in range(count):
        value = [copy.deepcopy(chance.choice(seeds))]  # in a list, so that it has a place
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            _change_value(value, chance)
        yield value[0]


def _change_value(root: list[Any], chance: random.Random) -> None:
    holder, key = chance.choice(list(_places(root)))
    match chance.randrange(6):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            name = chance.choice([str(key) + "s", str(key).upper(), "", *holder])
            holder[name] = holder.pop(key)
        case 2 if isinstance(holder, list) and holder is not root:
            holder[key:key] = [copy.deepcopy(holder[key])] * chance.choice((1, 2, 50))
        case 3:
            other, at = chance.choice(list(_places(root)))
            holder[key] = copy.deepcopy(other[at])
        case 4:
            holder[key] = _deep(chance.choice((2, 20, 100)), holder[key])
        case _:
            holder[key] = copy.deepcopy(chance.choice(ODD_VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value below `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list) and len(value[key]) < 2000:
            yield from _places(value[key])


def _deep(depth: int, value: Any) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def nested(depth: int = 200_000) -> bytes:
    """JSON that is deeper than any parser's stack."""
    return b"[" * depth + b"]" * depth


# ---- judging ----


class ForbiddenError(BaseException):
    """Not an Exception, so that no code under test takes it for its own."""


STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    "os.mkdir": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.rename": ((0, 2), (1, 3)),
}
"""Audit event -> which of its arguments are a path that it changes, and the folder that this starts
from.
"""
_allowed: list[str] = []  # folders, while a call is judged
_is_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _allowed:
        return
    if event in STARTS:
        raise ForbiddenError(f"a process was started: {event} {arguments[:2]!r}")
    places = CHANGES.get(event, ())
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        places = ((0, None),)
    for at, folder_at in places:
        path, folder = arguments[at], None if folder_at is None else arguments[folder_at]
        if isinstance(path, int):  # it is open already
            continue
        start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
        if not _is_inside(os.path.join(start, os.fsdecode(path))):
            raise ForbiddenError(f"a file outside was changed: {event} {path!r}")


def _is_inside(path: str) -> bool:
    parent, name = os.path.split(os.path.abspath(path))
    real = os.path.join(os.path.realpath(parent), name)
    if "__pycache__" in real:  # Python's own
        return True
    return any(real == folder or real.startswith(f"{folder}/") for folder in _allowed)


def judged(case: str, call: Callable[[], object], inside: Path) -> str:
    """RETURNED or REFUSED. `case` says how to make the input again."""
    global _is_hooked
    if not _is_hooked:  # for the rest of the process: hooks cannot be removed
        sys.addaudithook(_audit)
        _is_hooked = True

    def stop(*_: object) -> None:
        raise ForbiddenError(f"it took more than {LIMIT_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    _allowed.extend([os.path.realpath(inside), "/dev/null"])
    try:
        call()
        return RETURNED
    except (InputError, *WRONG_PATH) as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < LONGEST_MESSAGE, f"{case}: {text!r}"
        return REFUSED
    except (Exception, ForbiddenError) as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        _allowed.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
