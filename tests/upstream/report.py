"""Executes every row of docs/how-to/coming-from-being-vl-0.5.md and says what comes of it.

    python -m tests.upstream.report

prints a table and, last, one JSON line: `rows`, `word_for_word`, `one_sentence`, `missing`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import tests.upstream.python_calls  # noqa: F401  (adds to CHECKS)
from tests.upstream.calls import CHECKS, ONE_SENTENCE, WORD_FOR_WORD
from tests.upstream.world import REPOSITORY, World

PAGE = REPOSITORY / "docs/how-to/coming-from-being-vl-0.5.md"


def rows_of_page() -> dict[str, str]:
    """The page's tables without their heads: old, without backticks, -> new."""
    cells = re.findall(r"^\| (.+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {old.replace("`", ""): new for old, new in cells if old != "Being-VL-0.5"}


def main() -> int:
    rows = rows_of_page()
    results = dict.fromkeys((WORD_FOR_WORD, ONE_SENTENCE, "missing"), 0)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in rows:
            reason = ""
            try:
                result = CHECKS[name](world)
            except (Exception, SystemExit) as error:  # of whatever it calls
                result, reason = "missing", f" ({type(error).__name__}: {error})"[:300].strip()
            results[result] += 1
            print(f"{result:<14} {name}{reason}", flush=True)
    counts = {name.replace(" ", "_"): count for name, count in results.items()}
    print(json.dumps({"rows": len(rows), **counts}))
    return 1 if results["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
