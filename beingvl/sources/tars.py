"""Members of an uncompressed tar file, read to its real end in the memory of one header."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from beingvl.errors import InputError
from beingvl.sources.places import bare, opened

MAX_NOTE_BYTES = 1 << 20
NOTES = (  # beside a member: long names and other facts, which tarfile reads into memory
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _ShortNotes(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        found = super().frombuf(buf, encoding, errors)
        if found.type in NOTES and found.size > MAX_NOTE_BYTES:
            raise tarfile.ReadError(f"a note of {found.size:,} bytes beside a member")
        return found


class _ForgetfulTarFile(tarfile.TarFile):
    """tarfile keeps every header it has seen; this one reads millions in the memory of one."""

    def next(self) -> tarfile.TarInfo | None:
        self.members: list[tarfile.TarInfo] = []
        if self.offset == 0 and self.fileobj.tell():
            return None  # an empty tar, seen when it was opened; Python 3.10 seeks before its start
        return super().next()


def members_of(place: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member, with the open tar. Raises InputError for a tar that is damaged or cut off; who
    reads a member's content does so inside `readable_tar`, too.
    """
    with (
        readable_tar(place),
        opened(place) as file,
        _ForgetfulTarFile.open(fileobj=file, mode="r:", tarinfo=_ShortNotes) as tar,
    ):
        while (member := tar.next()) is not None:
            yield tar, member
        # tarfile takes any later header that it cannot read for the end, which is zeros
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            found = f"neither a header nor the end of the tar at byte {tar.offset}"
            raise tarfile.ReadError(found)


@contextmanager
def readable_tar(place: str) -> Iterator[None]:
    """Raises InputError when a tar turns out to be damaged or cut off."""
    try:
        yield
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of a disk or a store
            raise
        raise InputError(
            f"{bare(place)} is not a readable, uncompressed tar file ({error}); copy it again"
        ) from error
