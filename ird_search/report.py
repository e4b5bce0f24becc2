"""The table of a search, as plain text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ird_search.candidate import ProxyScore
from ird_search.search import Round, Scored
from ird_search.verdict import NAMES, Entry, Verdict

COLUMNS = ("", "samples", "density", "trained", "rate", "loss, 1st half", "loss, 2nd half", "")


def table_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """The verdict's table, header first."""
    header = (*COLUMNS[:-1], verdict.metric_name)
    return [header, *(_row(e) for e in verdict.entries)]


def text_table(verdict: Verdict) -> str:
    """The table for a terminal."""
    rows = table_rows(verdict)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def markdown_table(verdict: Verdict) -> str:
    """The table for `report.md`."""
    header, *rows = (f"| {' | '.join(row)} |" for row in table_rows(verdict))
    ruler = "|" + "|".join(["---", *["---:"] * (len(COLUMNS) - 1)]) + "|"
    return "\n".join([header, ruler, *rows])


def explained(verdict: Verdict, fixed_rate: float | None = None) -> str:
    """What the numbers are, and the plain sentences.

    Args:
        fixed_rate: the one learning rate that all lines were given, if they could not choose.
    """
    rates = "each line at its own best learning rate"
    if fixed_rate is not None:
        rates = (
            f"every line at the rate {fixed_rate:.1e} that was given, whether it suits it or not"
        )
    seeds = len(verdict["ird"].losses)
    floor = "" if math.isnan(verdict.noise) else f" Noise floor: {verdict.noise:.4f}."
    return "\n".join(
        [
            f"Loss is held-out negative log-likelihood. The 1st half chose among candidates; the "
            f"2nd half ({verdict.samples} samples) was seen by no choice:",
            f"mean ± standard deviation over {seeds} seeds, {rates}.{floor}",
            verdict.sentence("random"),
            verdict.sentence("fish"),
        ]
    )


def round_line(done: Round) -> str:
    """One line a round: what was nominated, where the walk went."""
    parts = []
    for s in done.nominated:
        mark = "→" if s is done.moved_to else " "
        parts.append(f"{mark}{s.move} {s.pair.rows.numel()} × {s.mask.count:,} {_score(s.proxy)}")
    return f"round {done.number}:  {'   '.join(parts)}"


def round_record(done: Round) -> dict[str, Any]:
    """A round as plain data, for `rounds.jsonl`."""
    return {
        "round": done.number,
        "moved_to": done.moved_to.move,
        "nominated": [_scored_record(s) for s in done.nominated],
    }


def markdown(
    verdict: Verdict, rounds: Sequence[Round], winner: Scored, provenance: Mapping[str, Any]
) -> str:
    """`report.md`."""
    dataset, base = provenance["dataset"], provenance["base_model"]
    lines = [
        f"# Mask for {base['id']}",
        "",
        f"{winner.mask.count:,} of {winner.mask.space.numel:,} candidate parameters "
        f"({winner.mask.density:.3%}), from {winner.pair.rows.numel()} samples of "
        f"{dataset['origin']}. Fisher path: {provenance['fisher']['path']}.",
        "",
        markdown_table(verdict),
        "",
        *explained(verdict, provenance["search"]["learning_rate"]).splitlines(),
        *provenance["notes"],
        "",
        *_to_train(provenance),
        "",
        "## Rounds",
        "",
        "| round | move | samples | parameters | rate | loss, 1st half | |",
        "|---:|---|---:|---:|---:|---:|---|",
    ]
    for done in rounds:
        for s in done.nominated:
            lines.append(
                f"| {done.number} | {s.move} | {s.pair.rows.numel()} | {s.mask.count:,} | "
                f"{s.proxy.best.rate:.1e} | {_score(s.proxy)} | "
                f"{'moved here' if s is done.moved_to else ''} |"
            )
    lines += ["", "## Where the mask lies", "", "| tensor | selected | of | share of mask |"]
    lines.append("|---|---:|---:|---:|")
    counts = sorted(winner.mask.indices.items(), key=lambda item: -item[1].numel())
    for name, index in counts[:15]:
        span = winner.mask.space.span(name)
        share = index.numel() / winner.mask.count
        lines.append(f"| `{name}` | {index.numel():,} | {span.stop - span.start:,} | {share:.1%} |")
    if len(counts) > 15:
        lines.append(f"| {len(counts) - 15} more tensors | | | |")
    return "\n".join(lines) + "\n"


def _to_train(provenance: Mapping[str, Any]) -> list[str]:
    """What a trainer needs beside the mask."""
    head = ", ".join(f"`{name}`" for name in provenance["head"]) or "none"
    return [
        "## To train it",
        "",
        f"* learning rate of the mask: {provenance['learning_rate']:.1e}",
        f"* trained whole beside it (`dense`): {head}",
        f"* their learning rate here: {provenance['search']['head_learning_rate']:.1e}",
    ]


def verdict_record(verdict: Verdict) -> list[dict[str, Any]]:
    """The verdict as plain data without NaN."""
    return [
        {
            "kind": e.kind,
            "samples": e.samples,
            "density": e.density,
            "parameters": e.parameters,
            "learning_rate": e.rate,
            "choose_score": _number(e.choose),
            "losses": list(e.losses),
            verdict.metric_name: _number(e.metric),
            "failure": e.failure,
        }
        for e in verdict.entries
    ]


def _row(e: Entry) -> tuple[str, ...]:
    numbers = (
        (f"{e.choose:.4f}", f"{e.loss:.4f}{_plus_minus(e.spread)}", f"{e.metric:.4f}")
        if not e.failure
        else ("failed", e.failure, "")
    )
    density = f"{e.density:.3%}" if e.kind not in ("full", "head") else "–"
    samples = str(e.samples) if e.samples else "–"
    return (NAMES[e.kind], samples, density, f"{e.parameters:,}", f"{e.rate:.1e}", *numbers)


def _plus_minus(spread: float) -> str:
    return "" if math.isnan(spread) else f" ± {spread:.4f}"


def _score(proxy: ProxyScore) -> str:
    return f"{proxy.score:.4f}" if proxy.best.ok else "failed"


def _scored_record(s: Scored) -> dict[str, Any]:
    best = s.proxy.best
    return {
        "move": s.move,
        "samples": s.pair.rows.numel(),
        "parameters": s.mask.count,
        "density": s.mask.density,
        "learning_rate": best.rate,
        "score": _number(s.proxy.score),
        "metrics": dict(best.metrics),
        "rates": [
            {
                "learning_rate": t.rate,
                "score": _number(t.score) if t.ok else None,
                "failure": t.failure,
            }
            for t in s.proxy.trials
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
