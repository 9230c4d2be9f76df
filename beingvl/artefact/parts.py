"""Work in numbered parts: what makes a step resumable, and its result the same on any number of
ranks.

    OUTPUT/parts.tmp/request.json    what is being made; the same for every rank and every start
    OUTPUT/parts.tmp/00000/ …        finished parts: each is written beside its place and
                                     renamed, so it is whole or absent
    OUTPUT/manifest.json             written, last, by the rank that finds all parts finished;
                                     then parts.tmp/ is removed

A part that two processes make at once is the same bytes twice, and the first stays. A process that
another has overtaken, so that its parts are joined and gone while it still makes one, ends well:
`writing` raises OvertakenError.

How the input is cut into parts is a function of the input alone. Rank r of R makes the parts r, r +
R, r + 2R, … that nobody has finished yet; a run that was killed is started again with any number of
ranks.

    4 parts, 2 ranks, rank 1 killed in part 3:      0 1 2 .      (rank 0 made 0 and 2, rank 1
        made 1)
    started again as one rank:                      makes 3, finds all four, joins them
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from beingvl.artefact.files import make_folder, sync, to_json, write_atomically
from beingvl.artefact.hashes import HashedFile
from beingvl.artefact.manifest import is_complete
from beingvl.artefact.progress import progress
from beingvl.artefact.request import Request
from beingvl.errors import InputError
from beingvl.json_file import read_json, read_object

FOLDER = "parts.tmp"  # manifests leave out what ends in .tmp
GONE = (errno.ENOENT, errno.ESTALE)  # what a removed folder answers, the second on a network disk


# ---- parts ----


class OvertakenError(Exception):
    """Another process removed the parts, or began anew: nothing is left to do for this one."""


class Parts:
    """The parts of one output folder; `request` says what is made, others are refused."""

    def __init__(self, output: Path, request: Mapping[str, Any], name: str = FOLDER) -> None:
        self.folder = output / name
        self._request = text = to_json(dict(request))
        make_folder(self.folder)
        path = self.folder / "request.json"
        if not path.exists():
            write_atomically(path, text)
        elif difference := Request(request).difference(read_object(path)):
            raise InputError(
                f"{output} holds unfinished work of {difference}; give the same inputs and options "
                "to finish it, choose another folder, or add --overwrite to start again"
            )

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def finished(self) -> set[int]:
        """Raises InputError when the parts are gone: who asks has found the output incomplete, in
        its turn.
        """
        if not self._are_ours():
            raise self.removed()
        return {int(name) for name in os.listdir(self.folder) if name.isdecimal()}

    def removed(self) -> InputError:
        return InputError(
            f"{self.folder} was removed while this process made parts of it; start the "
            "same command again"
        )

    def _are_ours(self) -> bool:
        try:
            return (self.folder / "request.json").read_text() == self._request
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False

    def missing(self, num_parts: int) -> list[int]:
        finished = self.finished()
        return [number for number in range(num_parts) if number not in finished]

    @contextlib.contextmanager
    def writing(self, number: int) -> Iterator[Path]:
        """A folder to write part `number` into; it gets its name when the block ends without an
        error.

        Raises OvertakenError when the parts were removed before that.
        """
        temporary = self.folder / f".{number:05d}.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                sync(path)
            if not self._are_ours():  # but of another request, whose parts these files must not be
                raise OvertakenError
            with contextlib.suppress(
                FileExistsError
            ):  # another process finished the same part meanwhile: the same bytes
                _rename_folder(temporary, self.path(number))
        except OSError as error:
            if error.errno not in GONE or self._are_ours():
                raise
            raise OvertakenError from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def show_life(self) -> None:
        """In the middle of a long part, for `wait_until_complete` of others."""
        with contextlib.suppress(FileNotFoundError):  # another run joined and removed the parts
            os.utime(self.folder)

    def read_json(self, num_parts: int, file: str) -> list[Any]:
        """One JSON file of every part, in order."""
        return [read_json(self.path(number) / file) for number in range(num_parts)]

    def join(self, num_parts: int, file: str, target: Path, head: bytes = b"") -> str:
        """Lay one file of every part end to end in `target`, behind `head`; returns its hash."""
        temporary = target.with_name(f"{target.name}.tmp")
        with open(temporary, "wb") as out:
            hashed = HashedFile(out)
            hashed.write(head)
            for number in progress(range(num_parts), name=f"join {file}", unit="part", leave=False):
                with open(self.path(number) / file, "rb") as part:
                    shutil.copyfileobj(part, hashed, 1 << 20)
        sync(temporary)
        os.replace(temporary, target)
        return hashed.hash

    def remove(self) -> None:
        remove_parts(self.folder.parent, self.folder.name)


def remove_parts(output: Path, name: str = FOLDER) -> None:
    """Also at the start of a step that is finished: it may have been killed between its manifest
    and this.

    The folder goes in one rename. A process that still makes a part of it finds no request there,
    never half of the folder; nor does a later start, should this one be killed meanwhile.
    """
    removed = output / f".{name}.removed.tmp"
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(output / name, removed)
    shutil.rmtree(removed, ignore_errors=True)


def _rename_folder(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(target) from error
        raise


def wait_until_complete(
    output: Path, patience_seconds: float = 1800, poll_seconds: float = 2
) -> None:
    """Return when the other ranks have finished `output`. Raises InputError when none shows life
    for so long: a part that is finished, or `Parts.show_life`, changes the time of the parts'
    folder.
    """
    seen, since = -1, time.monotonic()
    with progress(name=f"wait for {output}", unit="folder", total=1, leave=False):
        while not is_complete(output):
            try:
                now = (output / FOLDER).stat().st_mtime_ns
            except FileNotFoundError:
                now = 0
            if now != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > patience_seconds:
                raise InputError(
                    f"{output} is still incomplete and no rank has worked on a part for "
                    f"{patience_seconds:g} s; start again"
                )
            time.sleep(poll_seconds)
