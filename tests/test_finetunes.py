"""Fine-tunes: a model that is put back bit for bit, and what is kept of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import finetunes as module
from ird_search.batches import shuffled_rows
from ird_search.candidate import Attempt, Candidate
from ird_search.config import DataConfig, SearchConfig
from ird_search.errors import DataError
from ird_search.evaluation import Evaluation, evaluate
from ird_search.ledger import Ledger, Unit
from ird_search.problem import make_problem
from ird_search.proxy import Proxies
from tests.toy import (
    QUICK,
    bits,
    same_bits,
    toy_candidates,
    toy_mask,
    toy_net,
    toy_proxies,
    toy_rows,
    with_everything,
)


def test_each_seed_is_another_order_of_batches_and_each_half_other_samples() -> None:
    proxies = toy_proxies()
    (candidate, *_) = toy_candidates(proxies)
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


def test_full_fine_tuning_in_half_precision_loses_no_small_update() -> None:
    """1.0 − 40 · 1e-3 in steps that bfloat16 rounds away at 1.0; the head's rate is its own."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)).bfloat16()
    names = [name for name, _ in model.named_parameters()]
    optimizer = module._adamw(model, names, ["1.weight", "1.bias"], 1e-3, 2e-3, weight_decay=0.0)
    for p in model.parameters():
        nn.init.ones_(p)
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for name, p in model.named_parameters():
        moved = 40 * (2e-3 if name.startswith("1") else 1e-3)
        assert (1 - p.detach().float() - moved).abs().max() < 4e-3, name


def test_full_fine_tuning_without_a_head_is_the_same_at_any_precision() -> None:
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(2, 1).to(dtype)
        optimizer = module._adamw(model, ["weight", "bias"], [], 1e-3, 2e-3, weight_decay=0.0)
        rates.append({g["lr"] for g in optimizer.param_groups if g["params"]})
    assert rates == [{1e-3}] * 2


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
        proxies.score(toy_candidates(proxies)[0])
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


# --- batches ------------------------------------------------------------------------------------


def test_batches_are_whole_epochs() -> None:
    order: Tensor = shuffled_rows(7, 17, seed=3)
    assert sorted(order[:7].tolist()) == sorted(order[7:14].tolist()) == list(range(7))
    assert order[:7].tolist() != order[7:14].tolist() and len(order) == 17
    assert torch.equal(order, shuffled_rows(7, 17, seed=3))
    assert not torch.equal(order, shuffled_rows(7, 17, seed=4))


def test_a_short_order_holds_no_row_that_a_long_one_lacks() -> None:
    proxies = toy_proxies()  # 8 rows a step, 60 in all: several epochs
    for seed in (0, 1, 2):
        rows = {s: set(torch.cat(proxies._batches(seed, s)).tolist()) for s in range(1, 12)}
        assert all(rows[s] <= rows[s + 1] for s in range(1, 11)) and len(rows[1]) == 8


# --- the loss of each sample --------------------------------------------------------------------


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
        trial = proxies.trial(toy_candidates(proxies)[0], 0.01, verdict=True)
        assert trial.losses is not None and len(trial.losses) == len(proxies.problem.verdict)
        assert torch.equal(trial.losses, seen.pop().float())
        assert float(trial.losses.double().mean()) == pytest.approx(trial.loss)
    again = toy_proxies(directory=tmp_path)
    resumed = again.trial(toy_candidates(again)[0], 0.01, verdict=True)
    assert not seen and resumed == trial and torch.equal(resumed.losses, trial.losses)
    (unit,) = again.ledger.finished("proxy")
    assert "losses" not in unit.result["trial"] and "tensor" not in repr(trial)


def test_a_failed_trial_has_no_losses(tmp_path: Path) -> None:
    for _ in range(2):  # also where it comes from the ledger
        proxies = toy_proxies(with_everything(), directory=tmp_path)
        trial = proxies.trial(proxies.full(), 3e37)
        assert not trial.ok and trial.losses is None


def test_auc_can_be_what_ranks() -> None:
    by_loss, by_auc = toy_proxies(), toy_proxies(score="auc")
    (candidate, *_) = toy_candidates(by_loss)
    loss, auc = by_loss.score(candidate).best, by_auc.score(candidate).best
    assert loss.score == loss.loss == auc.loss
    assert auc.score == 1 - auc.metrics["auc"] != loss.score


# --- failures, and what is done already ---------------------------------------------------------


def test_running_out_of_memory_is_no_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    monkeypatch.setattr(module, "finetune", full)
    with pytest.raises(RuntimeError, match="can't allocate"):
        proxies.score(toy_candidates(proxies)[0])
    assert len(proxies.ledger) == 0


def test_another_error_of_the_model_is_a_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(module, "finetune", broken)
    assert proxies.score(toy_candidates(proxies)[0]).best.failure == "RuntimeError"


def test_a_metric_that_is_not_finite_is_a_failed_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = toy_proxies()

    def overflown(*args: Any, **kwargs: Any) -> Evaluation:
        return Evaluation(torch.ones(3), {"mse": float("inf")})

    monkeypatch.setattr(module, "evaluate", overflown)
    assert proxies.score(toy_candidates(proxies)[0]).best.failure == "mse is not finite"


def test_as_many_steps_are_another_unit(tmp_path: Path) -> None:
    proxies = toy_proxies(directory=tmp_path)
    (candidate, *_) = toy_candidates(proxies)
    short, long = (Attempt(candidate, 0.01, steps) for steps in (1, 3))
    first, second = proxies.trials([short, long])
    assert first.loss != second.loss and len(proxies.ledger) == 2
    assert second == proxies.trial(candidate, 0.01) and len(proxies.ledger) == 2
    told = [unit.result["told"]["steps"] for unit in proxies.ledger.finished("proxy")]
    assert sorted(told) == [1, 3]


def test_a_finished_unit_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, str]] = []
    proxies = toy_proxies(directory=tmp_path)
    (candidate, *_) = toy_candidates(proxies)
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


# --- samples that no fine-tune could take -------------------------------------------------------


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
