"""The benchmark's own rules: judged alike, nothing done twice, tables that say what cells say."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.glue import tables
from benchmarks.glue.__main__ import main
from benchmarks.glue.bench import Bench, at_work, descended
from benchmarks.glue.cells import FOLDER, Cell, Results, cells_of
from benchmarks.glue.efficiency import reached, stages
from benchmarks.glue.judging import Line, judge
from benchmarks.glue.methods import GROUPS, METHODS, ONCE, READINGS, RULES, chosen, run_search
from benchmarks.glue.scales import READINGS as OF_ROWS
from benchmarks.glue.scales import compare, random_rows, sizes
from benchmarks.glue.shifted import area, flipped, lopsided
from benchmarks.glue.tasks import Corpus, classes, joined, parted
from ird_search import moves
from ird_search.contest import SEEDS
from ird_search.errors import UsageError
from ird_search.ledger import Ledger, Unit
from ird_search.proxy import Proxies
from ird_search.reading import Reading
from tests.toy import bits, same_bits, toy_net, toy_problem

K = 3
"""Of 40 candidates."""
PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def opened(directory: Path | None = None, **settings: Any) -> Any:
    problem, config = toy_problem(learning_rate=None, **settings)
    return at_work("toy", problem, config, Ledger(directory), final_steps=6)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with opened() as found:
        yield found


def cell(bench: Bench, line: Line, **changes: Any) -> Cell:
    told = {"experiment": "methods", "method": "snr", "density": 0.25, **changes}
    return Cell.of(bench, line, **told)


def untimed(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "seconds": 0.0}


def test_the_rate_is_the_best_at_full_length_and_the_seeds_are_judged_on_other_rows(
    bench: Bench,
) -> None:
    line = judge(bench, METHODS["snr"](bench, K))
    again = {(t.rate, t.seed): t.score for t in line.found.again}
    means = {r: sum(again[r, s] for s in SEEDS) / len(SEEDS) for r, _ in again}
    assert line.tuned.best.rate == min(means, key=lambda r: (means[r], r))
    assert line.proxy.best.rate in {t.rate for t in line.tuned.trials}
    assert len(line.tuned.trials) >= 3 and len(means) >= 3
    assert [t.seed for t in line.trials] == [1, 2]
    assert {t.rate for t in line.trials} == {line.tuned.best.rate}
    assert line.losses.shape == (2, len(bench.problem.verdict))
    tuned = {(t.rate, t.seed) for t in (*line.tuned.trials, *line.found.again)}
    done = [line.proxy.trials, tuned, line.trials]
    assert line.cost.fine_tunes == sum(map(len, done))


def test_a_probe_as_long_as_the_proxies_counts_once() -> None:
    problem, config = toy_problem(learning_rate=None)
    ledger, told = Ledger(), list[Unit]()
    steps = config.proxy_steps
    with at_work("toy", problem, config, ledger, final_steps=steps) as bench:
        bench.proxies.on_trial = told.append
        assert judge(bench, METHODS["snr"](bench, K)).cost.fine_tunes == len(told)


def test_gains_are_paired_over_seeds_and_samples(bench: Bench) -> None:
    ours, theirs = (judge(bench, METHODS[name](bench, K)) for name in ("snr", "random"))
    found = cell(bench, ours, rivals={"random": theirs})
    means = zip(found.losses, (t.loss for t in theirs.trials), strict=True)
    mean, width = found.over["random"]
    assert mean == pytest.approx(sum(b - a for a, b in means) / 2, abs=2e-5)
    assert width is not None and width > 0


def test_masks_have_the_size_that_was_asked_for(bench: Bench) -> None:
    for name, method in METHODS.items():
        if name in ONCE or name == "lora":  # the toy is no transformer
            continue
        k = 10 if name in RULES else K  # a whole row is 4
        candidate = method(bench, k).draw(0)
        assert 0 < candidate.count <= k, name
        assert candidate.count == k or "whole" in name or "blocks" in name, name
    assert METHODS["bitfit"](bench, 0).draw(0).count == 8  # one layer beside the head
    with pytest.raises(UsageError, match="none of transformers"):
        METHODS["lora"](bench, K)


@pytest.mark.parametrize("name", ["random", "fish", "shuffled snr"])
def test_chance_draws_another_mask_for_each_seed(bench: Bench, name: str) -> None:
    draw, again = METHODS[name](bench, K).draw, METHODS[name](bench, K).draw
    assert len({draw(s).mask for s in range(4)}) > 1
    assert [draw(s).mask for s in range(4)] == [again(s).mask for s in range(4)]


def test_the_cold_head_gives_other_scores_and_is_taken_out_again(bench: Bench) -> None:
    before = bits(bench.problem.model)
    cold, warm = (METHODS[n](bench, K).draw(0).mask for n in ("fisher, cold head", "fisher"))
    assert same_bits(before, bench.problem.model)
    assert cold != warm


def test_the_model_is_handed_back_as_it_was() -> None:
    net = toy_net()
    before = bits(net)
    problem, config = toy_problem(net, learning_rate=None)
    with at_work("toy", problem, config, Ledger(), final_steps=6) as bench:
        assert not same_bits(before, net)  # the head is warmed up
        judge(bench, METHODS["snr"](bench, K))
    assert same_bits(before, net)


def test_what_the_ledger_holds_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Cell]:
        with opened(tmp_path) as bench:
            names = ("random", "ladder", "fisher, cold head")
            return [cell(bench, judge(bench, METHODS[name](bench, K))) for name in names]

    first = run()
    monkeypatch.setattr(Proxies, "_run", None)
    monkeypatch.setattr("benchmarks.glue.bench.open_fisher", None)
    assert run() == first


def test_rows_descend_as_in_the_search(bench: Bench) -> None:
    narrowings = bench.standard
    assert descended(narrowings, 16, 16, K).tolist() == list(range(16))
    assert [descended(narrowings, 16, n, K).numel() for n in (8, 4, 2, 1)] == [8, 4, 2, 1]
    fisher = narrowings._fisher
    assert fisher is not None
    explicit = moves.descended(fisher, narrowings.selector, (16, 8, 4), (40, 11, K))
    assert descended(narrowings, 16, 4, K).tolist() == explicit.tolist()


def test_scales_double_up_to_the_pool(bench: Bench) -> None:
    assert sizes(16) == [1, 2, 4, 8, 16]
    assert sizes(20) == [1, 2, 4, 8, 16, 20]
    draw = random_rows(bench, K, 4, Reading()).draw
    assert draw(1).mask == bench.standard.fish(bench.random_rows(4, 1), K)


def test_scales_that_are_named_are_compared(bench: Bench) -> None:
    kept: list[Cell] = []
    compare(bench, kept.append, [0.1], [2, 8], list(OF_ROWS))
    done = {(c.setting["rows"], c.setting["reading"]) for c in kept}
    assert done == {(2, "fisher"), (8, "fisher"), (8, "snr")}  # two rows have no signs to count
    assert {c.method for c in kept} == {"fish", "ird"} and len(kept) == 6
    assert all(("fish" in c.over) == (c.method == "ird") for c in kept)
    for rows, readings in (([0, 2], ["fisher"]), ([2, 99], ["fisher"]), ([2, 4], ["snr"])):
        with pytest.raises(UsageError):
            compare(bench, kept.append, [0.1], rows, readings)
    assert len(kept) == 6


def test_a_search_is_told_round_by_round(bench: Bench) -> None:
    state = run_search(bench, "walk", K)
    path = list(stages(state, bench.proxies))
    last = path[-1]
    assert last.candidates == len(state.scored)
    steps = [stage.cost.steps for stage in path]
    assert steps == sorted(steps)
    long = [s.proxy for s in state.scored if state.fits(s) and not s.proxy.short]
    assert last.best is not None and last.best.score == min(p.score for p in long)
    at = reached(path, state)
    assert at is not None and at["steps"] <= last.cost.steps


def test_flipped_labels_are_those_that_are_marked(bench: Bench) -> None:
    samples = bench.problem.train
    found = flipped(samples, 9, seed=3)
    assert torch.equal(classes(found.samples) != classes(samples), found.odd)
    assert int(found.odd.sum()) == 9


def test_a_lopsided_pool_has_its_share_of_one_class(bench: Bench) -> None:
    found = lopsided(bench.problem.train, 20, seed=3)
    assert len(found.samples) == 20
    assert torch.equal(classes(found.samples) != 0, found.odd)
    assert int(found.odd.sum()) == 2
    small = lopsided(bench.problem.train, 10_000, seed=3)  # more than there are
    assert 0.05 < small.odd.float().mean() < 0.15 and len(small.samples) < len(bench.problem.train)


def test_the_area_is_a_count_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(0, 5, (17,), generator=generator).double()
        odd = torch.rand(17, generator=generator) < 0.4
        pairs = [(a, b) for a in scores[odd] for b in scores[~odd]]
        counted = sum(float(a > b) + float(a == b) / 2 for a, b in pairs) / len(pairs)
        assert area(scores, odd) == pytest.approx(counted)


@pytest.mark.parametrize("from_train", [True, False])
def test_rows_that_choose_are_nobody_elses(from_train: bool) -> None:
    problem, _ = toy_problem()
    found = parted(problem, Corpus(choose=7, from_train=from_train), seed=0)
    sets = [found.train, found.choose, found.verdict]
    ids = [set(s.ids.tolist()) for s in sets]
    assert len(found.choose) == 7
    assert sum(map(len, ids)) == len(set.union(*ids)) == sum(map(len, sets)) == 80
    held = joined(problem.choose, problem.verdict).ids.tolist()
    assert sorted(ids[2]) == sorted(held) if from_train else ids[2] < set(held)


def test_words_stand_for_methods() -> None:
    assert chosen(["snr", "once", "snr"]) == ["snr", "full", "head", "bitfit"]
    assert set(chosen(list(GROUPS))) == set(METHODS)
    assert len(READINGS) == 48
    with pytest.raises(UsageError, match="Unknown method 'snrr'"):
        chosen(["snrr"])


def test_a_cell_replaces_the_one_of_its_name(tmp_path: Path, bench: Bench) -> None:
    results = Results(tmp_path, bench, tmp_path)
    line = judge(bench, METHODS["snr"](bench, K))
    for method in ("snr", "mean", "snr"):
        results.put(cell(bench, line, method=method))
    found = cells_of(results.path)
    assert list(found) == ["methods: mean @ 0.25, 6 steps", "methods: snr @ 0.25, 6 steps"]
    assert found["methods: snr @ 0.25, 6 steps"] == json.loads(
        json.dumps(asdict(cell(bench, line)))
    )


def test_processes_take_turns(tmp_path: Path, bench: Bench) -> None:
    line = judge(bench, METHODS["snr"](bench, K))

    def write(i: int) -> None:
        results = Results(tmp_path, bench, tmp_path)
        for j in range(3):
            results.put(cell(bench, line, method=f"{i} {j}"))

    workers = [multiprocessing.get_context("fork").Process(target=write, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(cells_of(tmp_path / "toy.json")) == 6


def told(method: str, density: float | None = 0.01, **changes: Any) -> dict[str, Any]:
    """A cell as it is in a file, with losses of mean 0.5."""
    plain: dict[str, Any] = {
        "experiment": "methods",
        "method": method,
        "density": density,
        "parameters": 10,
        "rate": 0.1,
        "losses": [0.4, 0.6],
        "choose": 0.8,
        "tuned": 0.7,
        "setting": {},
        "over": {},
        "figures": {},
        "failure": "",
    }
    return plain | changes


def test_the_table_of_methods() -> None:
    rows = [
        told("random"),
        told("snr", over={"random": [0.2, 0.1]}),
        told("mean", over={"random": [0.05, 0.1]}),
        told("fisher", failure="the loss is not finite", losses=[]),
        told("head", None, parameters=0),
    ]
    lines = tables.compared(rows).splitlines()
    assert lines[2:] == [
        "| random | 0.500 ± 0.141 |",
        "| fisher | failed |",
        "| mean | 0.500 ± 0.141 (+0.050 ± 0.100) |",
        "| snr | 0.500 ± 0.141 (**+0.200 ± 0.100**) |",
        "| head | 0.500 ± 0.141 (none beside the head) |",
    ]


def test_the_table_over_problems_has_students_interval() -> None:
    each = [[told("snr", over={"random": (g, 0.3)})] for g in (0.1, 0.2, 0.3)]
    for cells, loss in zip(each, (1, 2, 3), strict=True):
        cells.append(told("random", losses=(float(loss),), over={}))
    half = 4.302653 * 0.1 / 3**0.5
    table = tables.problems(each)
    assert f"| snr | +0.200 ± {half:.3f} (3 of 3) |" in table and "| random |" not in table
    assert "**+0.200" in tables.problems([e for e in each for _ in range(9)])


def test_the_table_of_scales_counts_them() -> None:
    rows = [
        told(
            "ird",
            experiment="scales",
            setting={"rows": n, "reading": "fisher"},
            over={"fish": [gain, 0.05]},
        )
        for n, gain in ((1, 0.1), (2, -0.01), (4, 0.02), (8, -0.2), (16, 0.3))
    ]
    text = tables.scales(rows, 16)
    assert "lower at 2 of 4 scales" in text  # 16 rows are the pool
    assert "better at 1 and worse at 1." in text


def test_the_table_of_correlations_is_spearmans() -> None:
    names = list(READINGS)[:6]
    rows = [told(n, losses=[i, i], choose=-i, tuned=i) for i, n in enumerate(names, start=1)]
    rows.append({**rows[-1], "method": "walk"})  # the same mask once more
    assert tables.correlation(rows).splitlines()[-1] == "| 1.00% | 6 | -1.00 | 1.00 |"


def test_lines_under_more_seeds_have_a_table_of_their_own(tmp_path: Path) -> None:
    setup = {"pool": 8, "train": 8, "proxy_steps": 6}
    for folder, seeds in (("", 2), (tables.MORE, 4)):
        rows = {"one": told("random", steps=6, losses=[float(seeds)] * seeds)}
        (tmp_path / folder).mkdir(exist_ok=True)
        text = json.dumps({"setup": setup, "cells": rows})
        (tmp_path / folder / "digits.json").write_text(text, encoding="utf-8")
    found = tables.made(tmp_path)
    assert list(found) == ["methods digits", "rates digits", "more seeds digits"]
    assert (
        "6 steps, 2 seeds" in found["methods digits"]
        and "| random | 2.000 " in found["methods digits"]
    )
    assert (
        "6 steps, 4 seeds" in found["more seeds digits"]
        and "| random | 4.000 " in found["more seeds digits"]
    )


def test_a_table_of_lines_that_failed_has_no_seeds() -> None:
    failed = told("snr", steps=6, losses=[], failure="it diverged")
    assert tables.by_length([failed]).startswith("After 6 steps, 0 seeds:")
    assert "6 steps, 1 seed:" in tables.by_length([told("snr", steps=6, losses=[0.5])])


def test_problems_are_pooled_without_the_one_things_were_made_on(tmp_path: Path) -> None:
    setup = {"pool": 8, "train": 8, "proxy_steps": 6}
    for i, folder in enumerate(("", "seed-1", "seed-2")):
        rows = {n: told(n, steps=6, over={"random": [0.1 + i / 10, 0.1]}) for n in ("snr", "mean")}
        (tmp_path / folder).mkdir(exist_ok=True)
        text = json.dumps({"setup": setup, "cells": rows})
        (tmp_path / folder / "digits.json").write_text(text, encoding="utf-8")
    found = tables.made(tmp_path)["problems digits, 6 steps"]
    assert "| 2 problems | 1.00% |" in found and "| snr | +0.250 ± " in found


def test_the_table_of_rates_has_every_length() -> None:
    rows = [
        told("random", rate=0.1, steps=6),
        told("random", rate=0.0316, steps=24),
        told("snr", rate=0.01, steps=24),
        told("full", None, rate=1e-4, steps=6),
    ]
    assert tables.rates(rows).splitlines() == [
        "After 6, 24 steps:",
        "",
        "|  | own size | 1.00% |",
        "| --- | --- | --- |",
        "| random |  | 1e-01, 3e-02 |",
        "| snr |  | –, 1e-02 |",
        "| full | 1e-04, – |  |",
    ]


def test_a_page_is_filled_between_its_markers() -> None:
    page = "a <!-- table: x -->old<!-- end --> b <!-- table: y z --><!-- end --> c"
    once = tables.filled(page, {"x": "1", "y z": "2"})
    assert tables.filled(once, {"x": "1", "y z": "2"}) == once
    assert "old" not in once and once.endswith("<!-- end --> c")
    with pytest.raises(UsageError, match="No cells for the table 'y z'"):
        tables.filled(page, {"x": "1"})


def test_the_page_of_results_is_what_the_cells_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert tables.filled(text, tables.made(FOLDER)) == text


@pytest.mark.slow
def test_the_digits_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--ledger", str(tmp_path / "ledger"), "--output", str(tmp_path)]
    short = [
        "--final",
        "2",
        "--density",
        "0.005",
        "--pool",
        "8",
        "--proxy-steps",
        "2",
        "--seeds",
        "2",
    ]
    extra = {
        "methods": ["--methods", "random", "snr", "lora", "once"],
        "scales": [],
        "shifted": [],
        "efficiency": ["--strategies", "walk", "tpe", "--trials", "4", "--rounds", "1"],
    }
    for experiment, options in extra.items():
        main([experiment, "digits", *at, *short, *options])
    capsys.readouterr()
    main(["--tables", *at])
    text = capsys.readouterr().out
    assert all(f"## {experiment} digits" in text for experiment in extra)
    assert "failed" not in text
