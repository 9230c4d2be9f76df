"""Progress of long work: a bar in terminals and notebooks, a line every half minute in logs."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

FIRST_SECONDS, LOG_SECONDS = 10, 30


class _LogLines(tqdm):
    """Prints whole lines instead of redrawing a bar, and nothing for short work.

    A thread prints them, so that they also appear while a single item takes long.
    """

    monitor_interval = 0  # tqdm's own thread

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, mininterval=math.inf, delay=math.inf)
        self._is_closed = threading.Event()
        threading.Thread(target=self._talk, daemon=True).start()

    def _talk(self) -> None:
        pause = FIRST_SECONDS
        plural = "" if self.unit == "B" else "s"
        while not self._is_closed.wait(pause):
            self.bar_format = f"{{desc}}: {{n_fmt}} of {{total_fmt}}{{unit}}{plural} in {{elapsed}}"
            if self.n > self.initial:  # else there is no rate yet
                self.bar_format += ", {remaining} left, {rate_fmt}{postfix}"
            self.fp.write(f"{self}\n")
            self.fp.flush()
            pause = LOG_SECONDS

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.n += 1
        finally:
            self.close()

    def display(self, msg: str | None = None, pos: int | None = None) -> None: ...

    def set_postfix(self, *args: Any, refresh: bool = True, **values: Any) -> None:
        super().set_postfix(*args, refresh=False, **values)  # the next line shows it

    def close(self) -> None:
        self._is_closed.set()
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
