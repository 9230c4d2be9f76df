"""Work in numbered parts: a step can be resumed, and its result is the same on any number of ranks.

    OUTPUT/parts.tmp/request.json    what is being made; the same for all ranks and starts
    OUTPUT/parts.tmp/00000/ …        finished parts: each is written under a temporary name and
                                     renamed, so it is complete or absent
    OUTPUT/manifest.json             written last, by the rank that finds all parts finished; then
                                     parts.tmp/ is removed

If two processes make the same part at once, both write the same bytes, and the first stays. If a
process is overtaken, so that the parts are joined and removed while it still makes one, it ends
cleanly: `writing` raises OvertakenError.

The input alone determines how it is divided into parts. Rank r of R makes those of the parts r,
r + R, r + 2R, … that nobody has finished yet. A killed run can be restarted with any number of
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

FOLDER = "parts.tmp"  # manifests omit what ends in .tmp
GONE = (errno.ENOENT, errno.ESTALE)  # errors for a removed folder, the second on network disks


# ---- parts ----


class OvertakenError(Exception):
    """Another process removed the parts, or started over: this one has nothing left to do."""


class Parts:
    """The parts of one output folder. `request` says what is made; others are refused, or removed
    if they are `cheap`.
    """

    def __init__(
        self, output: Path, request: Mapping[str, Any], name: str = FOLDER, cheap: bool = False
    ) -> None:
        self.folder = output / name
        self._request = text = to_json(dict(request))
        make_folder(self.folder)
        path = self.folder / "request.json"
        if path.exists() and (difference := Request(request).difference(read_object(path))):
            if not cheap:
                raise InputError(
                    f"{output} holds unfinished work with {difference}; give the same inputs and "
                    "options to finish it, choose another folder, or add --overwrite to start again"
                )
            print(f"{output} starts again: its unfinished work has {difference}")
            remove_parts(output, name)
            make_folder(self.folder)
        if not path.exists():
            write_atomically(path, text)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def finished(self) -> set[int]:
        """Numbers of the finished parts. Raises InputError if the parts are gone, because the
        caller has just found the output incomplete.
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
        """A folder to write part `number` to; it gets its final name when the block ends without
        error.

        Raises OvertakenError if the parts were removed before that.
        """
        temporary = self.folder / f".{number:05d}.{socket.gethostname()}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                sync(path)
            if not self._are_ours():  # our files must not become parts of a different request
                raise OvertakenError
            # Another process may have finished the same part, with the same bytes.
            with contextlib.suppress(FileExistsError):
                _rename_folder(temporary, self.path(number))
        except OSError as error:
            if error.errno not in GONE or self._are_ours():
                raise
            raise OvertakenError from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def show_life(self) -> None:
        """Called within long parts, for other processes in `wait_until_complete`."""
        with contextlib.suppress(FileNotFoundError):  # another run may have removed the parts
            os.utime(self.folder)

    def read_json(self, num_parts: int, file: str) -> list[Any]:
        """The same JSON file from all parts, in order."""
        return [read_json(self.path(number) / file) for number in range(num_parts)]

    def join(self, num_parts: int, file: str, target: Path, head: bytes = b"") -> str:
        """Concatenate `head` and the same file from all parts in `target`; returns its hash."""
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
    """Remove the folder of parts. Finished steps call it, too, because the run may have been killed
    after writing the manifest.

    The folder disappears in one rename: a process that still makes a part finds no request, but
    never half of the folder. The same holds for a later run if this one is killed meanwhile.
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
    """Return when the other ranks have finished `output`. Raises InputError if none shows life for
    `patience_seconds`: finished parts and `Parts.show_life` change the modification time of the
    parts' folder.
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
