"""The table of a search, as plain text and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ird_search.candidate import LOWEST_RATE, Kind, ProxyScore, Trial
from ird_search.pair import Scored
from ird_search.search import Round
from ird_search.verdict import NAMES, OTHERS, Entry, Verdict

SENTENCES: tuple[Kind, ...] = ("random", "shuffle", "fish")
"""Controls that a person is told of in words; the record has a sentence for each."""

INTERVALS = "Gains are paired; their 95% intervals cover other seeds and other held-out samples."

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

    A winner that is no better than a random mask is told so first.

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
    sentences = [verdict.sentence(kind) for kind in SENTENCES if kind in verdict]
    first = [verdict.sentence()] if "random" in verdict and not verdict.better else []
    idle = verdict.idle if fixed_rate is None else ""
    return "\n".join(
        [
            *filter(None, [*first, idle]),
            f"Loss is held-out negative log-likelihood. The 1st half chose among candidates; the "
            f"2nd half ({verdict.samples} samples) was seen by no choice:",
            f"mean ± standard deviation over {seeds} seed{'s' * (seeds != 1)}, {rates}.{floor}",
            *([INTERVALS] if seeds > 1 and verdict.controls else []),
            *(s for s in sentences if s not in first),
            *filter(None, [verdict.allocation]),
            *(f"Not compared with {OTHERS[k]}: {why}." for k, why in verdict.left_out.items()),
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
        "nominated": [
            {**_scored_record(s), "moved_to": s is done.moved_to} for s in done.nominated
        ],
    }


def markdown(
    verdict: Verdict, rounds: Sequence[Round], winner: Scored, provenance: Mapping[str, Any]
) -> str:
    """`report.md`."""
    dataset, base = provenance["dataset"], provenance["base_model"]
    lines = [
        f"# Mask for {base['id']}",
        "",
        *([verdict.sentence(), ""] if "random" in verdict else []),
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


def front_lines(found: Sequence[Scored], winner: Scored) -> list[str]:
    """The density-score front for `report.md`: what each size costs on the half that chooses."""
    lines = [
        "## Density and score",
        "",
        "No pair with at most as many parameters had a better score.",
        "",
        "| parameters | density | samples | reading | loss, 1st half | |",
        "|---:|---:|---:|---|---:|---|",
    ]
    for s in found:
        mark = "this mask" if s is winner else ""
        lines.append(
            f"| {s.mask.count:,} | {s.mask.density:.3%} | {s.pair.rows.numel()} | "
            f"{s.pair.reading} | {_score(s.proxy)} | {mark} |"
        )
    return [*lines, ""]


def _to_train(provenance: Mapping[str, Any]) -> list[str]:
    """What a trainer needs beside the mask."""
    head = ", ".join(f"`{name}`" for name in provenance["head"]) or "none"
    rate = provenance["learning_rate"]
    chosen = provenance["search"]["learning_rate"] is None and rate <= LOWEST_RATE
    idle = ", at which hardly anything is trained: look for one of your own" if chosen else ""
    return [
        "## To train it",
        "",
        f"* learning rate of the mask: {rate:.1e}{idle}",
        f"* trained whole beside it (`dense`): {head}",
        f"* their learning rate here: {provenance['search']['head_learning_rate']:.1e}",
    ]


def verdict_record(verdict: Verdict) -> list[dict[str, Any]]:
    """The verdict as plain data without NaN; controls with the winner's gain over them."""
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
            **(_gain_record(verdict, e.kind) if e.kind != "ird" else {}),
        }
        for e in verdict.entries
    ]


def _gain_record(verdict: Verdict, kind: Kind) -> dict[str, Any]:
    gain = verdict.against(kind)
    return {
        "gain": _number(gain.mean),
        "half_width": _number(gain.half_width),
        "sentence": verdict.sentence(kind),
    }


def _row(e: Entry) -> tuple[str, ...]:
    numbers = (
        (f"{e.choose:.4f}", f"{e.loss:.4f}{_plus_minus(e.spread)}", f"{e.metric:.4f}")
        if not e.failure
        else ("failed", e.failure, "")
    )
    density = f"{e.density:.3%}" if e.kind not in ("lora", "full", "head") else "–"
    samples = str(e.samples) if e.samples else "–"
    return (NAMES[e.kind], samples, density, f"{e.parameters:,}", f"{e.rate:.1e}", *numbers)


def _plus_minus(spread: float) -> str:
    return "" if math.isnan(spread) else f" ± {spread:.4f}"


def _score(proxy: ProxyScore) -> str:
    """In brackets where it is of a short fine-tune, which compares with others of its kind only."""
    if not proxy.best.ok:
        return "failed"
    return f"({proxy.score:.4f})" if proxy.short else f"{proxy.score:.4f}"


def _scored_record(s: Scored) -> dict[str, Any]:
    best = s.proxy.best
    return {
        "move": s.move,
        "samples": s.pair.rows.numel(),
        "parameters": s.mask.count,
        "density": s.mask.density,
        "reading": s.pair.reading.to_dict(),
        "learning_rate": best.rate,
        "score": _number(s.proxy.score),
        "metrics": dict(best.metrics),
        "short": s.proxy.short,
        "rates": list(map(_rate_record, s.proxy.trials)),
        "probes": list(map(_rate_record, s.proxy.probes)),
    }


def _rate_record(trial: Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.rate,
        "score": _number(trial.score) if trial.ok else None,
        "failure": trial.failure,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
