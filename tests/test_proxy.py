"""Proxies: the same start and batches for all, and a model that is put back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import proxy as module
from ird_search.candidate import Attempt, Candidate, ProxyScore, Trial
from ird_search.config import DataConfig, SearchConfig
from ird_search.errors import DataError, NoProxySucceeded
from ird_search.evaluation import Evaluation, evaluate
from ird_search.ledger import Ledger, Unit
from ird_search.problem import make_problem
from ird_search.proxy import Proxies, shuffled_rows
from tests.toy import QUICK, bits, same_bits, toy_mask, toy_net, toy_proxies, toy_rows


def with_everything() -> nn.Sequential:
    """Dropout draws numbers, BatchNorm has buffers, and one module is in a mode of its own.

    Candidates: 0-31, 32-39 the first layer, 40-55 BatchNorm, 56-127 the second layer.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    net[3].eval()
    return net


def untimed(trial: Trial) -> Trial:
    return replace(trial, seconds=0.0)


def candidates(proxies: Proxies) -> list[Candidate]:
    masks = [toy_mask(proxies.problem, *coords) for coords in ((0, 5, 9), (1, 2), (30, 33))]
    return [Candidate("ird", mask) for mask in masks]


class Scripted(Proxies):
    """Proxies whose trials answer from a function of what is attempted."""

    def __init__(self, answer: Callable[[Attempt], float | None], **settings: Any) -> None:
        real = toy_proxies(**settings)
        super().__init__(real.problem, real.config, Ledger())
        self.answer, self.asked = answer, list[Attempt]()

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        return [self._answered(a) for a in attempts]

    def _answered(self, a: Attempt) -> Trial:
        self.asked.append(a)
        found = self.answer(a)
        failure = "" if found else "diverged"
        return Trial(a.rate, a.seed, found or 0.0, found or 0.0, {}, 1.0, failure)

    def tried(self, candidate: Candidate, steps: int) -> list[float]:
        """The rates of a candidate at one budget, in their order."""
        return [a.rate for a in self.asked if a.candidate is candidate and a.steps == steps]


# --- the same for all ---------------------------------------------------------------------------


def test_the_order_of_scoring_does_not_matter() -> None:
    forward, backward, again = (toy_proxies(with_everything()) for _ in range(3))
    first = [untimed(forward.score(c).best) for c in candidates(forward)]
    last = [untimed(backward.score(c).best) for c in reversed(candidates(backward))]
    torch.manual_seed(1234)  # the caller's random state is no part of it
    assert first == last[::-1] == [untimed(again.score(c).best) for c in candidates(again)]
    assert len({t.loss for t in first}) == 3  # and the masks do differ


def test_each_seed_is_another_order_of_batches_and_each_half_other_samples() -> None:
    proxies = toy_proxies()
    (candidate, *_) = candidates(proxies)
    trials = [
        proxies.trial(candidate, 0.01, seed=s, verdict=v) for s in (0, 1) for v in (False, True)
    ]
    assert len({t.loss for t in trials}) == 4


@pytest.mark.parametrize("kind", ["ird", "random", "full", "head"])
def test_the_model_is_put_back(kind: Any) -> None:
    model = with_everything()
    proxies = toy_proxies(model)
    before, modes = bits(model), [m.training for m in model.modules()]
    mask = toy_mask(proxies.problem, 0, 9, *range(40, 120))
    candidate = Candidate(kind, mask if kind in ("ird", "random") else proxies.head_only().mask)
    assert proxies.score(candidate).best.ok
    assert same_bits(before, model)
    diverged = proxies.trial(candidate, 3e37)
    assert not diverged.ok and "diverged" in diverged.failure
    assert same_bits(before, model)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["full", "ird", "head"])
def test_the_head_has_its_own_rate_beside_whatever_is_trained(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's first step is as long as its rate, wherever there is a gradient."""
    proxies = toy_proxies(head_learning_rate=0.07)
    model, before = proxies.problem.model, bits(proxies.problem.model)
    moved: dict[str, float] = {}

    def look(*args: Any, **kwargs: Any) -> Any:
        for name, p in model.named_parameters():
            moved[name] = float((p.detach() - before[name]).abs().max())
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", look)
    mask = toy_mask(proxies.problem, *range(40))
    candidate = Candidate(kind, mask if kind == "ird" else proxies.head_only().mask)
    assert proxies.trials([Attempt(candidate, 0.002, 1)])[0].ok
    for name, distance in moved.items():
        is_head = name in proxies.problem.head
        rate = 0.002 if kind == "head" or not is_head else 0.07
        assert distance == pytest.approx(rate if is_head or kind != "head" else 0.0, rel=1e-3), name


def test_the_scoring_point_depends_on_no_rate_of_the_head() -> None:
    """What is kept of a Fisher pass is not addressed by it."""
    one, other = (toy_proxies(head_learning_rate=r).advanced(3).tensors() for r in (0.003, 0.3))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_the_model_is_put_back_after_an_exception(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_everything()
    proxies = toy_proxies(model)
    before, seen = bits(model), []

    def broken(*args: Any, **kwargs: Any) -> None:
        seen.append(same_bits(before, model))
        raise error

    monkeypatch.setattr(module, "evaluate", broken)
    with pytest.raises(error):
        proxies.score(candidates(proxies)[0])
    assert seen == [False]  # the fine-tune had changed it
    assert same_bits(before, model)


def test_frozen_entries_keep_their_bits_while_the_others_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = toy_net()
    proxies = toy_proxies(model, weight_decay=0.1)
    mask, head = toy_mask(proxies.problem, 0, 5, 9, 35), proxies.problem.head
    before, violations = bits(model), []

    def spy(*args: Any, **kwargs: Any) -> Any:
        now = bits(model)
        violations.append(mask.verify(before, now, dense=head))
        moved = mask.space.flatten(now) != mask.space.flatten(before)
        assert moved.nonzero().flatten().tolist() == mask.coords.tolist()
        assert not any(torch.equal(before[name], now[name]) for name in head)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", spy)
    assert proxies.score(Candidate("ird", mask)).best.ok
    assert violations == [[]]


# --- learning rates -----------------------------------------------------------------------------


def probe(answer: Callable[[float], float | None], start: float = 0.01) -> tuple[list[float], Any]:
    proxies = Scripted(lambda a: answer(a.rate), learning_rate=None)
    candidate = Candidate("ird", toy_mask(proxies.problem, 0), start=start)
    found = proxies.score(candidate)
    tried = proxies.tried(candidate, proxies.config.proxy_steps)
    assert [t.rate for t in found.trials] == sorted(tried) and len(proxies.asked) == len(tried)
    return tried, found


def test_three_rates_a_factor_of_three_apart() -> None:
    tried, found = probe(lambda rate: 0.1 + abs(rate - 0.01))
    assert sorted(tried) == pytest.approx([0.0032, 0.01, 0.032])
    assert found.best.rate == 0.01 and found.seconds == 3.0


def test_the_probe_goes_on_past_an_end_while_that_is_better() -> None:
    tried, found = probe(lambda rate: abs(rate - 0.1) + 0.1)
    assert tried == pytest.approx([0.0032, 0.01, 0.032, 0.1, 0.32]) and found.best.rate == 0.1
    tried, found = probe(lambda rate: rate)  # ever smaller is ever better: at most three more
    assert sorted(tried) == pytest.approx([1e-4, 3.2e-4, 1e-3, 3.2e-3, 0.01, 0.032])
    tried, found = probe(lambda rate: 1 / rate)
    assert max(tried) == pytest.approx(1.0) and found.best.rate == max(tried) and len(tried) == 6


def test_rates_that_diverge_send_the_probe_down() -> None:
    tried, found = probe(lambda rate: 0.5 - rate if rate < 0.001 else None)
    assert found.best.ok and found.best.rate == pytest.approx(3.2e-4)
    assert sum(not t.ok for t in found.trials) == len(tried) - 2


def test_when_all_diverge_the_score_is_infinite() -> None:
    tried, found = probe(lambda rate: None)
    assert found.score == float("inf") and len(tried) == 6 and not found.best.ok


def test_a_fixed_rate_is_the_only_one() -> None:
    proxies = Scripted(lambda a: 1.0, learning_rate=0.007)
    proxies.score(Candidate("random", toy_mask(proxies.problem, 0)))
    assert [(a.rate, a.steps) for a in proxies.asked] == [(0.007, 3)]


def test_without_a_head_the_head_alone_is_scored_once() -> None:
    proxies = toy_proxies(learning_rate=None, head=[])
    before = bits(proxies.problem.model)
    found = proxies.warm_up()
    assert len(found.trials) == 1 and same_bits(before, proxies.problem.model)


def test_random_masks_begin_at_a_larger_rate() -> None:
    problem = toy_proxies().problem
    sparse, dense = toy_mask(problem, 0), toy_mask(problem, *range(16))
    for kind in ("ird", "random"):
        assert Candidate(kind, sparse).start_rate() >= Candidate(kind, dense).start_rate()
    assert Candidate("random", sparse).start_rate() > Candidate("ird", sparse).start_rate()
    ratio = Candidate("random", sparse).start_rate() / Candidate("random", dense).start_rate()
    assert ratio == pytest.approx(4)  # 1/√density


# --- successive budgets -------------------------------------------------------------------------

SHORT, LONG = 10, 40
BUDGETS: dict[str, Any] = {"probe_steps": SHORT, "proxy_steps": LONG, "learning_rate": None}


def masks(proxies: Proxies, *sizes: int) -> list[Candidate]:
    """A mask of each size."""
    return [Candidate("ird", toy_mask(proxies.problem, *range(n)), start=0.01) for n in sizes]


def by_size(scores: dict[int, float | None], rate: float = 0.01) -> Callable[[Attempt], Any]:
    """A score for each size of mask, at its best at a rate."""

    def answer(a: Attempt) -> float | None:
        score = scores[a.candidate.count]
        return None if score is None else score + abs(math.log(a.rate / rate))

    return answer


def test_all_are_tried_shortly_and_the_better_half_at_length() -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6}), **BUDGETS)
    some = masks(proxies, 1, 2, 3, 4)
    found = proxies.scores(some)
    assert [f.short for f in found] == [True, False, False, True]
    for candidate in some:
        assert sorted(proxies.tried(candidate, SHORT)) == [0.0032, 0.01, 0.032]
    for candidate in some[1:3]:
        assert proxies.tried(candidate, LONG) == [0.01, 0.032]
    assert proxies.tried(some[0], LONG) == proxies.tried(some[3], LONG) == []
    steps = [a.steps for a in proxies.asked]
    assert steps == sorted(steps)  # no long one before the last short one
    assert [len(f.trials) for f in found] == [3, 2, 2, 3]
    assert [len(f.probes) for f in found] == [0, 3, 3, 0]
    assert min(found, key=lambda f: f.order) is found[1] and found[1].seconds == 5.0


def test_a_long_run_ranks_before_a_short_one_and_a_failed_one_last() -> None:
    ok, bad = Trial(0.1, 0, 0.5, 0.5), Trial(0.1, 0, 0.0, 0.0, failure="diverged")
    better = replace(ok, score=0.1)
    ranked = [
        ProxyScore(ok, (ok,)),
        ProxyScore(better, (better,), short=True),
        ProxyScore(ok, (ok,), short=True),
        ProxyScore(bad, (bad,)),
        ProxyScore(bad, (bad,), short=True),
    ]
    assert sorted(reversed(ranked), key=lambda f: f.order) == ranked


def test_a_longer_run_that_diverges_falls_back() -> None:
    """What a short one got through may end a long one; then lower rates are tried."""

    def answer(a: Attempt) -> float | None:
        return None if a.steps == LONG and a.rate > 2e-3 else 1 + abs(math.log(a.rate / 0.01))

    proxies = Scripted(answer, **BUDGETS)
    one, two = masks(proxies, 1, 2)
    found, _ = proxies.scores([one, two])
    assert proxies.tried(one, LONG) == [0.01, 0.032, 0.0032, 0.001]
    assert not found.short and found.best.ok and found.best.rate == 0.001


def test_longer_runs_find_a_rate_of_their_own() -> None:
    at_length = by_size({1: 0.5, 2: 0.3}, rate=0.1)
    shortly = by_size({1: 0.5, 2: 0.3})
    proxies = Scripted(lambda a: (at_length if a.steps == LONG else shortly)(a), **BUDGETS)
    one, two = masks(proxies, 1, 2)
    _, found = proxies.scores([one, two])
    assert proxies.tried(two, LONG) == [0.01, 0.032, 0.1, 0.32]
    assert found.best.rate == 0.1 and [t.rate for t in found.probes] == [0.0032, 0.01, 0.032]


@pytest.mark.parametrize(("count", "promote", "kept"), [(3, 0.5, 2), (4, 0.25, 1), (5, 0.5, 3)])
def test_ties_at_the_cut_go_to_fewer_parameters(count: int, promote: float, kept: int) -> None:
    proxies = Scripted(lambda a: 1.0, **BUDGETS)
    some = masks(proxies, *range(count, 0, -1))
    found = proxies.scores(some, promote=promote)
    assert [f.short for f in found] == [True] * (count - kept) + [False] * kept
    alike = [masks(proxies, 2)[0] for _ in range(count)]  # then to the earlier
    found = proxies.scores(alike, promote=promote)
    assert [f.short for f in found] == [False] * kept + [True] * (count - kept)


@pytest.mark.parametrize(
    ("settings", "promote"),
    [({}, 1.0), ({"probe_steps": LONG}, 0.5), ({"probe_steps": LONG + 1}, 0.5)],
)
def test_there_is_one_budget_where_a_second_would_decide_nothing(
    settings: dict[str, Any], promote: float
) -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3, 3: 0.4}), **{**BUDGETS, **settings})
    found = proxies.scores(masks(proxies, 1, 2, 3), promote=promote)
    assert [a.steps for a in proxies.asked] == [LONG] * 9
    assert not any(f.short or f.probes for f in found)


def test_a_fixed_rate_is_one_fine_tune_a_budget() -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3}), **{**BUDGETS, "learning_rate": 0.02})
    found = proxies.scores(masks(proxies, 1, 2))
    asked = [(a.candidate.count, a.rate, a.steps) for a in proxies.asked]
    assert asked == [(1, 0.02, SHORT), (2, 0.02, SHORT), (2, 0.02, LONG)]
    assert [f.short for f in found] == [True, False]


def test_one_that_fails_at_every_rate_goes_no_further() -> None:
    proxies = Scripted(by_size({1: None, 2: 0.3, 3: None, 4: None}), **BUDGETS)
    some = masks(proxies, 1, 2, 3, 4)
    found = proxies.scores(some)
    assert [f.short for f in found] == [True, False, True, True]
    assert [f.best.ok for f in found] == [False, True, False, False]
    assert len(proxies.tried(some[0], SHORT)) == 6 and proxies.tried(some[0], LONG) == []


def test_where_all_fail_as_many_as_ever_go_on_and_tell_why() -> None:
    proxies = Scripted(lambda a: None, **BUDGETS)
    found = proxies.scores(masks(proxies, 4, 3, 2, 1))
    assert [f.short for f in found] == [True, True, False, False]
    assert all(f.best.failure == "diverged" and f.score == float("inf") for f in found)


def test_a_short_order_holds_no_row_that_a_long_one_lacks() -> None:
    proxies = toy_proxies()  # 8 rows a step, 60 in all: several epochs
    for seed in (0, 1, 2):
        rows = {s: set(torch.cat(proxies._batches(seed, s)).tolist()) for s in range(1, 12)}
        assert all(rows[s] <= rows[s + 1] for s in range(1, 11)) and len(rows[1]) == 8


def test_as_many_steps_are_another_unit(tmp_path: Path) -> None:
    proxies = toy_proxies(directory=tmp_path)
    (candidate, *_) = candidates(proxies)
    short, long = (Attempt(candidate, 0.01, steps) for steps in (1, 3))
    first, second = proxies.trials([short, long])
    assert first.loss != second.loss and len(proxies.ledger) == 2
    assert second == proxies.trial(candidate, 0.01) and len(proxies.ledger) == 2
    told = [unit.result["told"]["steps"] for unit in proxies.ledger.finished("proxy")]
    assert sorted(told) == [1, 3]


# --- the loss of each sample ----------------------------------------------------------------------


def test_each_trial_knows_the_loss_of_every_held_out_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Evaluation:
        found = evaluate(*args, **kwargs)
        seen.append(found.losses)
        return found

    monkeypatch.setattr(module, "evaluate", spy)
    for directory in (None, tmp_path):
        proxies = toy_proxies(directory=directory)
        trial = proxies.trial(candidates(proxies)[0], 0.01, verdict=True)
        assert trial.losses is not None and len(trial.losses) == len(proxies.problem.verdict)
        assert torch.equal(trial.losses, seen.pop().float())
        assert float(trial.losses.double().mean()) == pytest.approx(trial.loss)
    again = toy_proxies(directory=tmp_path)
    resumed = again.trial(candidates(again)[0], 0.01, verdict=True)
    assert not seen and resumed == trial and torch.equal(resumed.losses, trial.losses)
    (unit,) = again.ledger.finished("proxy")
    assert "losses" not in unit.result["trial"] and "tensor" not in repr(trial)


def test_a_failed_trial_has_no_losses(tmp_path: Path) -> None:
    for _ in range(2):  # also where it comes from the ledger
        proxies = toy_proxies(with_everything(), directory=tmp_path)
        trial = proxies.trial(proxies.full(), 3e37)
        assert not trial.ok and trial.losses is None


# --- failures, and what is done already -----------------------------------------------------------


def test_a_diverging_rate_is_recorded_and_the_next_one_tried() -> None:
    proxies = toy_proxies(with_everything(), learning_rate=None)
    mask = toy_mask(proxies.problem, *range(40, 120))
    found = proxies.score(Candidate("ird", mask, start=1e36))
    assert [t.ok for t in found.trials] == [False] * 6 and found.score == float("inf")
    assert all("diverged" in t.failure for t in found.trials)
    assert proxies.score(Candidate("ird", mask, start=0.01)).best.ok


def test_running_out_of_memory_is_no_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    monkeypatch.setattr(module, "finetune", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        proxies.score(candidates(proxies)[0])
    assert len(proxies.ledger) == 0


def test_another_error_of_the_model_is_a_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(module, "finetune", broken)
    assert proxies.score(candidates(proxies)[0]).best.failure == "RuntimeError"


def test_a_finished_unit_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, str]] = []
    proxies = toy_proxies(directory=tmp_path)
    (candidate, *_) = candidates(proxies)
    first = proxies.score(candidate)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "finetune", never)
    again = toy_proxies(directory=tmp_path)

    def tell(unit: Unit) -> None:
        of = unit.result["told"]
        told.append((of["kind"], unit.result["trial"]["rate"], of["stage"]))

    again.on_trial = tell
    assert again.score(candidate) == first
    assert told == [("ird", first.best.rate, "warm-up")]
    # the same mask from another rule is the same fine-tune, and is told once
    assert again.score(Candidate("random", candidate.mask)) == first and len(told) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"proxy_steps": 4},
        {"batch_size": 4},
        {"weight_decay": 0.1},
        {"seed": 1},
        {"head_learning_rate": 0.1},
        {"learning_rate": 0.02},
    ],
)
def test_a_unit_with_other_settings_is_another_unit(change: dict[str, Any], tmp_path: Path) -> None:
    proxies = toy_proxies(directory=tmp_path)
    mask = toy_mask(proxies.problem, 0, 5, 9)
    first = proxies.score(Candidate("ird", mask)).best
    other = toy_proxies(directory=tmp_path, **change)
    assert other.score(Candidate("ird", mask)).best.loss != first.loss
    assert len(other.ledger) == 2


def test_auc_can_be_what_ranks() -> None:
    by_loss, by_auc = toy_proxies(), toy_proxies(score="auc")
    (candidate, *_) = candidates(by_loss)
    loss, auc = by_loss.score(candidate).best, by_auc.score(candidate).best
    assert loss.score == loss.loss == auc.loss
    assert auc.score == 1 - auc.metrics["auc"] != loss.score


# --- the warm-up --------------------------------------------------------------------------------


def test_the_warm_up_trains_the_head_and_nothing_else() -> None:
    proxies = toy_proxies()
    model = proxies.problem.model
    before, cold = bits(model), toy_proxies().score(candidates(proxies)[0])
    proxies.warm_up()
    changed = [n for n, old in before.items() if not torch.equal(old, model.state_dict()[n])]
    assert changed == list(proxies.problem.head) == ["2.weight", "2.bias"]
    assert proxies.score(candidates(proxies)[0]).best.loss != cold.best.loss


def test_a_head_that_cannot_be_trained_ends_the_search() -> None:
    proxies = toy_proxies(learning_rate=3e37)
    before = bits(proxies.problem.model)
    with pytest.raises(NoProxySucceeded, match=r"head only, rate 3e\+37: Training diverged"):
        proxies.warm_up()
    assert same_bits(before, proxies.problem.model)


# --- evaluation ---------------------------------------------------------------------------------


def test_an_evaluation_is_each_sample_by_itself() -> None:
    problem = toy_proxies(with_everything()).problem
    found = evaluate(problem.model, problem.task, problem.choose, device=problem.device)
    losses, right = [], []
    problem.model.eval()
    for sample, label in zip(problem.choose.inputs, problem.choose.labels, strict=True):
        with torch.no_grad():
            logits = problem.model(sample["input"][None])[0]
        losses.append(-float(logits.log_softmax(0)[int(label)]))
        right.append(int(logits.argmax()) == int(label))
    torch.testing.assert_close(found.losses.float(), torch.tensor(losses))
    assert found.metrics["accuracy"] == pytest.approx(sum(right) / len(right))


def test_batches_are_whole_epochs() -> None:
    order: Tensor = shuffled_rows(7, 17, seed=3)
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))
    assert order[:7].tolist() != order[7:14].tolist() and len(order) == 17
    assert torch.equal(order, shuffled_rows(7, 17, seed=3))
    assert not torch.equal(order, shuffled_rows(7, 17, seed=4))


# --- samples that no fine-tune could take ---------------------------------------------------------


def without_finite(count: int, *bad: int) -> list[tuple[Tensor, int]]:
    rows = toy_rows(count)
    for i in bad:
        rows[i] = (torch.zeros(4), rows[i][1])  # finite itself, but its logarithm is not
    return rows


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs().log()


def logarithmic() -> nn.Sequential:
    return nn.Sequential(Logarithm(), *toy_net())


def test_a_sample_without_a_finite_likelihood_is_left_out_everywhere() -> None:
    config = SearchConfig(**{**QUICK, "proxy_steps": 40, "eval_samples": 220})
    rows = without_finite(880, 5, 400, 700)
    problem = make_problem(logarithmic(), rows, options=DataConfig(), config=config)
    proxies = Proxies(problem, config, Ledger())
    proxies.check()
    left_out = sorted(i for ids in proxies.left_out.values() for i in ids)
    sets = {"choose": problem.choose, "verdict": problem.verdict}
    drawn = torch.cat([torch.cat(proxies._batches(*order)) for order in proxies._orders()])
    assert not torch.isin(problem.train.ids[drawn], torch.tensor([5, 400, 700])).any()
    for name, samples in sets.items():
        bad = set(samples.ids.tolist()) & {5, 400, 700}
        assert len(proxies.sets[name]) == len(samples) - len(bad)
        assert bad <= set(left_out)
    assert set(left_out) <= {5, 400, 700} and left_out
    assert proxies.score(proxies.full()).best.ok  # each of them would have failed it
    again = Proxies(problem, config, Ledger())
    assert not again.score(again.full()).best.ok


def test_too_many_of_them_end_the_search_with_their_rows() -> None:
    config = SearchConfig(**QUICK)
    problem = make_problem(
        logarithmic(), without_finite(80, 7, 11, 30), options=DataConfig(), config=config
    )
    with pytest.raises(DataError, match=r"of \d+ \w+ samples have a log-likelihood.*(7|11|30)"):
        Proxies(problem, config, Ledger()).check()


def test_a_metric_that_is_not_finite_is_a_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def overflown(*args: Any, **kwargs: Any) -> Evaluation:
        return Evaluation(torch.ones(3), {"mse": float("inf")})

    monkeypatch.setattr(module, "evaluate", overflown)
    assert proxies.score(candidates(proxies)[0]).best.failure == "mse is not finite"
