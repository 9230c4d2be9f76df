"""Progress of long work: a bar in a terminal or a notebook, a line every half minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30


class _LogLines(tqdm):
    """Whole lines instead of a bar that is drawn over itself; none for work that is soon done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        counted = "{desc}: {n_fmt} of {total_fmt}{unit} in {elapsed}, {remaining} left"
        super().__init__(
            *args,
            **options,
            mininterval=LOG_SECONDS,
            delay=LOG_SECONDS,
            bar_format=counted + ", {rate_fmt}{postfix}",
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def set_postfix(self, *args: Any, refresh: bool = True, **values: Any) -> None:
        super().set_postfix(*args, refresh=False, **values)  # shown with the next line

    def close(self) -> None:
        self.disable = True


def progress(
    items: Iterable[Any] | None = None,
    *,
    name: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
) -> tqdm:
    """Iterate over `items`, or count with `update(n)` inside a `with`. Bytes are unit "B"."""
    is_bar = sys.stderr.isatty() or "ipykernel" in sys.modules
    return (tqdm if is_bar else _LogLines)(
        items,
        desc=name,
        total=total,
        initial=initial,
        leave=leave,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
    )
