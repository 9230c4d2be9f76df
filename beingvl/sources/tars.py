"""Members of an uncompressed tar file, read to its real end in the memory of one header."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from beingvl.errors import InputError
from beingvl.sources.places import opened


class _ForgetfulTarFile(tarfile.TarFile):
    """tarfile keeps every header it has seen; this one reads millions in the memory of one."""

    def next(self) -> tarfile.TarInfo | None:
        self.members: list[tarfile.TarInfo] = []
        if self.offset == 0 and self.fileobj.tell():
            return None  # an empty tar, seen when it was opened; Python 3.10 seeks before its start
        return super().next()


def members_of(place: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member, with the open tar. Raises InputError for a tar that is damaged or cut off."""
    try:
        with opened(place) as file, _ForgetfulTarFile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield tar, member
            # tarfile takes any later header that it cannot read for the end, which is zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                found = f"neither a header nor the end of the tar at byte {tar.offset}"
                raise tarfile.ReadError(found)
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{place} is not a readable, uncompressed tar file ({error}); copy it again"
        ) from error
