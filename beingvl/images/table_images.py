"""Images inside tables (parquet, Arrow); an image's key is TABLE#ROW/N."""

from __future__ import annotations

from collections.abc import Sequence

from beingvl.errors import InputError
from beingvl.sources.places import bare, stamp, stamps_elsewhere
from beingvl.sources.tables import Table, numbers_of, refuse_equal_names

NO_STAMP = "none"


class TableImages:
    """An ImageSource. Reading is fastest in key order."""

    def __init__(self, places: Sequence[str]) -> None:
        refuse_equal_names(places)
        self._tables = {table.name: table for table in map(Table, places)}
        self._stamps = {name: stamp(table.place) for name, table in self._tables.items()}
        if not any(table.picture_columns for table in self._tables.values()):
            raise InputError(
                f"{bare(places[0])} has no column of pictures (bytes, or structs with `bytes`); "
                f"its columns are {next(iter(self._tables.values())).schema.names}"
            )

    def keys(self) -> list[str]:
        return sorted(key for table in self._tables.values() for key in table.picture_keys())

    def read(self, key: str) -> bytes:
        table, row, number = self._find(key)
        return table.picture(row, number)

    def stamp(self, key: str) -> str:
        name = key.partition("#")[0]
        return self._stamps.get(name, NO_STAMP)

    def elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        return stamps_elsewhere(table.place for table in self._tables.values())

    def _find(self, key: str) -> tuple[Table, int, int]:
        name, _, numbers = key.partition("#")
        found = numbers_of(numbers)
        if name not in self._tables or found is None:
            raise InputError(f"{key}: not in the tables {', '.join(self._tables)}")
        return self._tables[name], *found
