"""Proxies: the same start and batches for all, and a model that is put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import proxy as module
from ird_search.candidate import Attempt, Candidate, Trial
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
    """Proxies whose trials answer from a function of the rate."""

    def __init__(self, answer: Callable[[float], float | None], **settings: Any) -> None:
        real = toy_proxies(**settings)
        super().__init__(real.problem, real.config, Ledger())
        self.answer, self.tried = answer, list[float]()

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        return [self._answered(a) for a in attempts]

    def _answered(self, a: Attempt) -> Trial:
        self.tried.append(a.rate)
        found = self.answer(a.rate)
        failure = "" if found else "diverged"
        return Trial(a.rate, a.seed, found or 0.0, found or 0.0, {}, 1.0, failure)


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
    proxies = Scripted(answer, learning_rate=None)
    mask = toy_mask(proxies.problem, 0)
    found = proxies.score(Candidate("ird", mask, start=start))
    assert [t.rate for t in found.trials] == sorted(proxies.tried)
    return proxies.tried, found


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
    proxies = Scripted(lambda rate: 1.0, learning_rate=0.007)
    proxies.score(Candidate("random", toy_mask(proxies.problem, 0)))
    assert proxies.tried == [0.007]


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
