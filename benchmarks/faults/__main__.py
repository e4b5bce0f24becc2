"""Run campaigns, record their rows, and write the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, write_result

CAMPAIGNS = ("files", "inputs", "kills", "signals", "disk", "memory", "workers", "ledger")
PAGE = Path("docs/reliability.md")
START, END = "<!-- table: made by python -m benchmarks.faults -->", "<!-- end of table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaigns", nargs="*", help=f"of {', '.join(CAMPAIGNS)}; all by default")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    names = [] if options.table else options.campaigns or CAMPAIGNS
    if unknown := set(names) - set(CAMPAIGNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CAMPAIGNS)}")
    rows = _before(options.output)
    for name in names:
        found = import_module(f"benchmarks.faults.{name}").campaign()
        rows[name] = [asdict(row) for row in found]
        for row in found:
            print(f"{row.held:>6,} of {row.tried:>6,}  {row.fault}")
            print("".join(f"        {text}\n" for text in row.failures), end="")
        write_result("faults", {"campaigns": rows}, options.output)
    ordered = [row for name in CAMPAIGNS for row in rows.get(name, [])]
    if options.output == RESULTS:
        _rewrite(PAGE, table(ordered))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| fault | what is promised | kept | measured |", "|---|---|---:|---|"]
    for r in rows:
        measured = "; ".join(f"{name} {_told(value)}" for name, value in r["figures"].items())
        kept = f"{r['held']:,} of {r['tried']:,}"
        lines.append(f"| {r['fault']} | {r['promise']} | {kept} | {measured} |")
    return "\n".join(lines)


def _told(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 10 else f"{value:.2g}"


def _before(folder: Path) -> dict[str, Any]:
    """The rows of campaigns that ran earlier."""
    path = folder / "faults.json"
    return json.loads(path.read_text())["campaigns"] if path.exists() else {}


def _rewrite(page: Path, text: str) -> None:
    whole = page.read_text()
    before, rest = whole.split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
