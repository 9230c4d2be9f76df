"""The table of scripts/ablation.sh next to the paper's: every regime with every kind of codes.

python scripts/ablation_table.py RUN      reads RUN/seed-*/CODES-REGIME/eval/scores.json,
                                          writes RUN/ablation.md and RUN/index.html
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from markupsafe import Markup

from beingvl.artefact.files import write_atomically
from beingvl.json_file import read_object
from beingvl.report.kit import page

LEAD = (
    "Exact match on perception / reasoning questions in per cent, means over seeds (how many) ± "
    "spread (largest - smallest). The paper's (arXiv 2506.23639) are averages of benchmarks with "
    "vBPE at 8B, so only the order of the lines can be compared. About codes, the paper reports "
    "that VQAv2 rises from 54.3 without vBPE to 80.2 with 8192 merges."
)
CODES = {"raw": "raw codes", "running": "vBPE, running", "anchor": "vBPE, anchor"}
KINDS = ("perception", "reasoning")
REGIMES = {  # name -> description, and the paper's perception / reasoning
    "both": ("curriculum and progressive", "80.3 / 71.1"),
    "progressive": ("progressive only", "74.9 / 65.1"),
    "curriculum": ("curriculum only", "76.8 / 67.5"),
    "single": ("single stage", "71.2 / 62.3"),
}


def cell(run: Path, name: str) -> str:
    """The table cell for the runs `name` of all seeds that have one."""
    scores = [read_object(path) for path in sorted(run.glob(f"seed-*/{name}/eval/scores.json"))]
    found = []
    for kind in KINDS if scores else ():
        of_seeds = [100 * one["categories"][kind]["accuracy"] for one in scores]
        found.append(
            f"{np.mean(of_seeds):.1f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{np.ptp(of_seeds):.1f}"
        )
    return " / ".join(found) + f" ({len(scores)})" if scores else "not run"


def orders(run: Path) -> list[str]:
    """For each kind of codes: the regimes' order by mean accuracy over those seeds that have all of
    them, and the paper's order.
    """
    of_paper = sorted(REGIMES, key=lambda name: REGIMES[name][1], reverse=True)
    lines = ["The paper, best first: " + ", ".join(REGIMES[name][0] for name in of_paper) + "."]
    for codes, words in CODES.items():
        seeds = [
            {name: _accuracy(seed / f"{codes}-{name}/eval/scores.json") for name in REGIMES}
            for seed in sorted(run.glob("seed-*"))
            if all((seed / f"{codes}-{name}/eval/scores.json").is_file() for name in REGIMES)
        ]
        if seeds:
            found = {name: float(np.mean([seed[name] for seed in seeds])) for name in REGIMES}
            here = sorted(of_paper, key=found.__getitem__, reverse=True)  # ties: as in the paper
            same = "the same order" if here == of_paper else "a different order than the paper's"
            same = same if len({*found.values()}) > 1 else "no difference"
            shown = ", ".join(f"{REGIMES[name][0]} {found[name]:.1f}" for name in here)
            lines.append(f"{words}: {same} (seeds: {len(seeds)}): {shown}.")
    return lines


def _accuracy(path: Path) -> float:
    categories = read_object(path)["categories"]
    return 100 * float(np.mean([categories[kind]["accuracy"] for kind in KINDS]))


def table(run: Path) -> list[list[str]]:
    head = ["perception / reasoning (seeds)", *CODES.values(), "the paper, vBPE"]
    rows = [
        [words, *(cell(run, f"{codes}-{name}") for codes in CODES), paper]
        for name, (words, paper) in REGIMES.items()
    ]
    return [head, *rows]


def main(run: Path) -> None:
    rows = table(run)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    words = orders(run)
    write_atomically(run / "ablation.md", "\n".join([LEAD, "", *lines, "", *words, ""]))
    row = Markup("<tr>{}</tr>")
    cells = (Markup("").join(Markup("<td>{}</td>").format(text) for text in row) for row in rows)
    body = Markup('<div class="wide"><table>{}</table></div>{}').format(
        Markup("").join(map(row.format, cells)),
        Markup("").join(map(Markup("<p>{}</p>").format, words)),
    )
    write_atomically(run / "index.html", page("Being-VL: ablation", body, LEAD))
    print("\n".join([*lines, *words]), f"\n{run}: ablation.md, index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
