"""Tables in Markdown, made from the cells alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

from scipy import stats

from benchmarks.glue.cells import cells_of
from benchmarks.glue.methods import METHODS, READINGS
from benchmarks.glue.shifted import ROW_RULES
from benchmarks.glue.tasks import TASKS
from ird_search.config import Criterion
from ird_search.errors import UsageError
from ird_search.reading import CEILINGS, SKIPS, Reading

Row = Mapping[str, Any]
"""A cell as it is in the file."""

END = "<!-- end -->"
OTHERS = "seed-*"
"""Folders with the results of other problems of the same kind than the one things were made on."""
MORE = "more-seeds"
"""The folder with lines of the same problems under more seeds."""


def made(folder: Path) -> dict[str, str]:
    """Every table that the cells in a folder allow, by its name."""
    found: dict[str, str] = {}
    for task in TASKS:
        path = folder / f"{task}.json"
        if path.exists():
            cells = list(cells_of(path).values())
            setup = json.loads(path.read_text(encoding="utf-8"))["setup"]
            found |= {f"{name} {task}": text for name, text in _tables(cells, setup)}
            if more := list(cells_of(folder / MORE / path.name).values()):
                found[f"more seeds {task}"] = by_length(more)
            each = [
                list(cells_of(p).values()) for p in sorted(folder.glob(f"{OTHERS}/{path.name}"))
            ]
            for steps in _lengths(c for some in each for c in some):
                here = [[c for c in some if c["steps"] == steps] for some in each]
                if sum(map(bool, here)) > 1:
                    found[f"problems {task}, {steps} steps"] = problems([h for h in here if h])
    return found


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Write the tables into a page."""
    page.write_text(filled(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A page with what stands between its markers replaced.

    Raises:
        UsageError: a marker names no table.

    Example:
        >>> filled("<!-- table: a -->old<!-- end --> text", {"a": "| new |"})
        '<!-- table: a -->\\n\\n| new |\\n\\n<!-- end --> text'
    """

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        if name not in tables:
            raise UsageError(f"No cells for the table {name!r}. There are {', '.join(tables)}.")
        return f"<!-- table: {name} -->\n\n{tables[name]}\n\n{END}"

    return re.sub(rf"<!-- table: (.+?) -->.*?{END}", replaced, text, flags=re.DOTALL)


def _tables(cells: Sequence[Row], setup: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    makers: dict[str, Callable[[list[Row]], str]] = {
        "methods": by_length,
        "scales": lambda rows: scales(rows, min(setup["pool"], setup["train"])),
        "shifted": shifted,
        "efficiency": efficiency,
    }
    for name, make in makers.items():
        if rows := [c for c in cells if c["experiment"] == name]:
            yield name, make(rows)
    rows = [c for c in cells if c["experiment"] == "methods"]
    if rows:
        yield "rates", rates(rows)
    for steps in _lengths(rows):
        same = [c for c in rows if c["steps"] == steps]
        for density in _densities(same):
            here = [c for c in same if c["density"] == density]
            if sum(c["method"] in READINGS for c in here) > 10:
                yield f"criteria {density:g}, {steps} steps", criterion_table(here)
        if steps > setup["proxy_steps"]:
            yield f"correlation, {steps} steps", correlation(same)


def by_length(rows: Sequence[Row]) -> str:
    """Methods × densities, a table for each length of the fine-tunes that count."""
    parts = []
    for steps in _lengths(rows):
        here = [c for c in rows if c["steps"] == steps]
        parts.append(f"After {steps} steps, {_seeds(here)}:\n\n{compared(here)}")
    return "\n\n".join(parts)


def rates(rows: Sequence[Row]) -> str:
    """Methods × densities: the learning rate after each length."""
    lengths, densities = _lengths(rows), [None, *_densities(rows)]
    body = []
    for name in _plain(rows):
        at = {(c["density"], c["steps"]): f"{c['rate']:.0e}" for c in rows if c["method"] == name}
        told = [[at.get((d, steps), "–") for steps in lengths] for d in densities]
        body.append([name, *("" if set(each) == {"–"} else ", ".join(each) for each in told)])
    titles = ["own size", *(f"{d:.2%}" for d in densities if d is not None)]
    after = ", ".join(map(str, lengths))
    return f"After {after} steps:\n\n{_markdown(['', *titles], body)}"


def _plain(rows: Sequence[Row]) -> list[str]:
    """Methods in their order, without readings that have a ceiling and a skip."""
    names = sorted({c["method"] for c in rows}, key=list(METHODS).index)
    return [n for n in names if n not in READINGS or n.count(",") < 2]


def compared(rows: Sequence[Row]) -> str:
    """Methods × densities: mean loss, and the gain over a random mask."""
    densities = _densities(rows)
    body = []
    for name in _plain(rows):
        own = {c["density"]: c for c in rows if c["method"] == name}
        if None in own:
            parameters = f"{own[None]['parameters']:,}" if own[None]["parameters"] else "all"
            size = "none" if name == "head" else parameters
            told = [f"{_loss(own[None])} ({size} beside the head)"]
            body.append([name, *told, *[""] * (len(densities) - 1)])
        else:
            body.append([name, *(_judged(own.get(d), "random") for d in densities)])
    titles = [f"{d:.2%}" for d in densities] or [""]  # of methods with a size of their own alone
    return _markdown(["", *titles], body)


def problems(each: Sequence[Sequence[Row]]) -> str:
    """Methods × densities: the gain over a random mask, over several problems of one kind."""
    every = [c for cells in each for c in cells if c["experiment"] == "methods"]
    densities, known = _densities(every), list(METHODS)
    names = [n for n in known if all(any(c["method"] == n for c in cells) for cells in each)]
    body = []
    for name in names:
        told = []
        for d in densities:
            mine = [c for c in every if c["method"] == name and c["density"] == d]
            gains = [c["over"]["random"][0] for c in mine if "random" in c["over"]]
            told.append(_over_problems(gains) if len(gains) > 1 else "")
        if any(told):
            body.append([name, *told])
    return _markdown([f"{len(each)} problems", *(f"{d:.2%}" for d in densities)], body)


def _over_problems(gains: Sequence[float]) -> str:
    """Mean and Student's half width; how often it is above zero."""
    width = float(stats.t.ppf(0.975, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    text = f"{mean(gains):+.3f} ± {width:.3f}"
    marked = f"**{text}**" if abs(mean(gains)) > width else text
    return f"{marked} ({sum(g > 0 for g in gains)} of {len(gains)})"


def criterion_table(rows: Sequence[Row]) -> str:
    """Criterion and ceiling × ranks passed over: mean loss."""
    by = {c["method"]: c for c in rows}
    body = []
    criteria: tuple[Criterion, ...] = get_args(Criterion)
    for criterion in criteria:
        for ceiling in CEILINGS:
            cells = [by.get(str(Reading(criterion, ceiling, skip))) for skip in SKIPS]
            bound = "none" if ceiling is None else f"{ceiling:g}"
            body.append([criterion, bound, *(_judged(c, "random") for c in cells)])
    return _markdown(["criterion", "ceiling", *(f"skip {s:g}" for s in SKIPS)], body)


def scales(rows: Sequence[Row], pool: int) -> str:
    """Rows × densities: IRD's gain over FISH; and at how many scales its loss is lower."""
    parts = []
    for reading in dict.fromkeys(c["setting"]["reading"] for c in rows):
        ours = [c for c in rows if c["method"] == "ird" and c["setting"]["reading"] == reading]
        at = {(c["setting"]["rows"], c["density"]): c for c in ours}
        sizes, densities = sorted({n for n, _ in at}), _densities(ours)
        body = [[str(n), *(_gain(at.get((n, d)), "fish") for d in densities)] for n in sizes]
        chosen = [c["over"]["fish"] for (n, _), c in at.items() if n < pool and c["over"]]
        told = [
            f"Read by `{reading}`:",
            _markdown(["rows", *(f"{d:.2%}" for d in densities)], body),
        ]
        if chosen:
            told.append(_won(chosen))
        parts.append("\n\n".join(told))
    return "\n\n".join(parts)


def _won(gains: Sequence[Sequence[float | None]]) -> str:
    """In how many scales, with Wilson's interval; and in how many by more than chance."""
    lower = sum(g > 0 for g, _ in gains if g is not None)
    low, high = stats.binomtest(lower, len(gains)).proportion_ci(method="wilson")
    told = [(g, w) for g, w in gains if g is not None and w is not None]
    better, worse = sum(g > w for g, w in told), sum(-g > w for g, w in told)
    return (
        f"IRD's mean loss is lower at {lower} of {len(gains)} scales with fewer rows than the pool "
        f"({lower / len(gains):.0%}, 95% interval {low:.0%} to {high:.0%} as if scales were "
        "independent, which sharing rows and seeds they are not); by more than chance it "
        f"is better at {better} and worse at {worse}."
    )


def shifted(rows: Sequence[Row]) -> str:
    """Pools and row rules × readings, with what the row scores say of odd rows."""
    readings = list(dict.fromkeys(c["setting"]["reading"] for c in rows))
    several, body = len(_densities(rows)) > 1, []
    methods = ["fish", *ROW_RULES]
    for key in sorted({_key(c) for c in rows}, key=lambda k: (*k[:2], methods.index(k[2]))):
        own = {c["setting"]["reading"]: c for c in rows if _key(c) == key}
        figures = next(iter(own.values()))["figures"]
        pool = f"{key[1]} at {key[0]:.2%}" if several else key[1]
        known = [f"{figures['odd']:.0%}" if "odd" in figures else ""]
        known += [f"{figures['auc']:.2f}" if "auc" in figures else ""]
        body.append([pool, key[2], *known, *(_judged(own.get(r), "fish") for r in readings)])
    titles = (f"loss by `{r}` (gain over fish)" for r in readings)
    return _markdown(["pool", "rows", "odd rows chosen", "AUC of r", *titles], body)


def _key(c: Row) -> tuple[float, str, str]:
    return c["density"], c["setting"]["pool"], c["method"]


def efficiency(rows: Sequence[Row]) -> str:
    """Strategies: what they cost, what they found, and when the walk had come as far."""
    body = []
    for density in _densities(rows):
        here = [c for c in rows if c["density"] == density]
        walk = next((c for c in here if c["method"] == "walk"), None)
        for c in here:
            f = c["figures"]
            spent = [f"{f['search'][x]:,}" for x in ("candidates", "fine_tunes", "steps")]
            found = [f"{f['best']:.4f}", _loss(c), f["reading"], _reached(walk, c)]
            body.append([f"{density:.2%}", c["method"], *spent, *found])
    titles = ["density", "strategy", "candidates", "fine-tunes", "steps", "best proxy", "loss"]
    return _markdown([*titles, "reading", "walk not told apart after"], body)


def _reached(walk: Row | None, c: Row) -> str:
    """How much of another strategy's candidates and steps the walk took to its best."""
    if walk is None or c["method"] not in walk["figures"]["reached"]:
        return ""
    at, whole = walk["figures"]["reached"][c["method"]], c["figures"]["search"]
    if at is None:
        return "never"
    shares = [f"{at[x] / whole[x]:.0%} of its {x}" for x in ("candidates", "steps")]
    return f"{at['candidates']} candidates ({', '.join(shares)})"


def correlation(rows: Sequence[Row]) -> str:
    """Spearman's rank correlation of what was known earlier with the final loss."""
    body = []
    for density in _densities(rows):
        every = [c for c in rows if c["density"] == density and c["losses"]]
        here = list({tuple(c["losses"]): c for c in every}.values())  # of one mask once
        told = []
        for known in ("choose", "tuned"):
            pairs = [(c[known], mean(c["losses"])) for c in here if c[known] is not None]
            enough = len(pairs) > 4
            rho = stats.spearmanr(*zip(*pairs, strict=True)).statistic if enough else None
            told.append("" if rho is None else f"{rho:.2f}")
        body.append([f"{density:.2%}", str(len(here)), *told])
    titles = ["proxy", "full length, same rows"]
    return _markdown(["density", "methods", *titles], body)


def _lengths(rows: Iterable[Row]) -> list[int]:
    return sorted({c["steps"] for c in rows})


def _seeds(rows: Iterable[Row]) -> str:
    """How many each line has that has any."""
    counts = [len(c["losses"]) for c in rows if c["losses"]]
    ends = dict.fromkeys((min(counts, default=0), max(counts, default=0)))
    return f"{' to '.join(map(str, ends))} seed{'s' * (max(ends) != 1)}"


def _densities(rows: Iterable[Row]) -> list[float]:
    return sorted({c["density"] for c in rows if c["density"] is not None})


def _judged(c: Row | None, other: str) -> str:
    """Loss and gain; bold where the gain is more than chance."""
    if c is None:
        return ""
    if c["failure"]:
        return "failed"
    gain = _gain(c, other)
    if not gain:
        return _loss(c)
    return f"{_loss(c)} ({gain})"


def _gain(c: Row | None, other: str) -> str:
    if c is None or other not in c["over"]:
        return ""
    gain, width = c["over"][other]
    if width is None:
        return f"{gain:+.3f}"
    text = f"{gain:+.3f} ± {width:.3f}"
    return f"**{text}**" if abs(gain) > width else text


def _loss(c: Row) -> str:
    spread = f" ± {stdev(c['losses']):.3f}" if len(c["losses"]) > 1 else ""
    return f"{mean(c['losses']):.3f}{spread}" if c["losses"] else "failed"


def _markdown(titles: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
