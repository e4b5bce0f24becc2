"""Tasks: log-likelihoods against torch.distributions, metrics against their definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from ird_search.errors import ModelError, UsageError
from ird_search.task import IGNORED, CausalLM, Classification, Regression, logits_of, make_task


class Wrapped(nn.Module):
    """Returns its logits in whatever is asked for."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, input: Tensor) -> Any:
        return self.wrap(input)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, None), lambda x: SimpleNamespace(logits=x)],
    ids=["tensor", "tuple", "output"],
)
def test_logits_are_found(wrap: Any) -> None:
    x = torch.randn(2, 3)
    assert logits_of(Wrapped(wrap), {"input": x}) is x


def test_inputs_go_by_name_or_by_position() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    class Positional(nn.Module):
        def forward(self, whatever: Tensor) -> Tensor:
            return whatever

    a, b = torch.ones(2), torch.zeros(2)
    assert torch.equal(logits_of(Two(), {"b": b, "a": a}), a)
    assert torch.equal(logits_of(Positional(), {"input": a}), a)


def test_an_output_without_logits_is_refused() -> None:
    with pytest.raises(ModelError, match=r"returned dict; .* `.logits`, is needed"):
        logits_of(Wrapped(lambda x: {"scores": x}), {"input": torch.zeros(1)})


def test_classification_log_likelihood() -> None:
    logits, labels = torch.randn(7, 4), torch.randint(4, (7,))
    found = Classification(4).log_likelihood(logits, labels)
    torch.testing.assert_close(found, Categorical(logits=logits).log_prob(labels))
    torch.testing.assert_close(Classification(4).loss(logits, labels), -found.mean())


def test_regression_log_likelihood() -> None:
    logits, labels = torch.randn(7, 1), torch.randn(7)
    found = Regression().log_likelihood(logits, labels)
    torch.testing.assert_close(found, Normal(logits[:, 0], 1.0).log_prob(labels))


def test_causal_log_likelihood_is_a_product_over_labelled_tokens() -> None:
    logits, labels = torch.randn(3, 6, 5), torch.randint(5, (3, 6))
    labels[0, :3] = IGNORED
    labels[1, 4:] = IGNORED
    wanted = torch.zeros(3)
    for b in range(3):
        for t in range(1, 6):
            if labels[b, t] != IGNORED:
                wanted[b] += Categorical(logits=logits[b, t - 1]).log_prob(labels[b, t])
    task = CausalLM()
    torch.testing.assert_close(task.log_likelihood(logits, labels), wanted)
    tokens = (labels[:, 1:] != IGNORED).sum()
    torch.testing.assert_close(task.loss(logits, labels), -wanted.sum() / tokens)
    summary = task.summary(logits, labels)
    assert task.metrics(summary, labels)["perplexity"] == pytest.approx(
        math.exp(-float(wanted.sum()) / int(tokens))
    )


@pytest.mark.parametrize("task", [Classification(3), Regression(), CausalLM()])
def test_half_precision_logits_are_widened(task: Any) -> None:
    shape = {"classification": (2, 3), "regression": (2, 1), "causal-lm": (2, 4, 3)}[task.name]
    kind = {"classification": (2,), "regression": (2,), "causal-lm": (2, 4)}[task.name]
    labels = torch.ones(kind, dtype=torch.float32 if task.name == "regression" else torch.int64)
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        logits = torch.randn(shape, dtype=dtype)
        assert (
            task.log_likelihood(
                logits, labels.to(wanted) if labels.is_floating_point() else labels
            ).dtype
            == wanted
        )


def test_classification_metrics_by_hand() -> None:
    # predicted 1 1 0 0 1, gold 1 0 0 1 1: TP 2, FP 1, TN 1, FN 1
    margin, gold = torch.tensor([2.0, 1.0, -1.0, -2.0, 3.0]), torch.tensor([1, 0, 0, 1, 1])
    found = Classification(2).metrics(torch.stack([-margin, margin], 1), gold)
    assert next(iter(found)) == Classification.metric == "accuracy"
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    # Of the 3 × 2 pairs (positive, negative) 4 are in order.
    assert found["auc"] == pytest.approx(4 / 6)


def test_classification_metrics_of_several_classes() -> None:
    gold, predicted = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    found = Classification(3).metrics(nn.functional.one_hot(predicted, 3).float(), gold)
    assert set(found) == {"accuracy", "f1"}
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_a_class_that_does_not_occur_makes_no_two_class_problem() -> None:
    labels = torch.tensor([0, 2, 0, 2])
    found = Classification(3).metrics(nn.functional.one_hot(labels, 3).float(), labels)
    assert found == {"accuracy": 1.0, "f1": 1.0}


def test_metrics_where_they_are_not_defined() -> None:
    one_class = Classification(2).metrics(torch.tensor([[1.0, 0.0]] * 3), torch.zeros(3).long())
    assert one_class == {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0, "auc": 0.5}
    constant = Regression().metrics(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_regression_metrics() -> None:
    gold = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = Regression().metrics(gold[:, None] ** 3, gold)
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1
    assert found["mse"] == pytest.approx((0 + 36 + 24**2 + 60**2) / 4)


def test_tasks_by_name() -> None:
    assert make_task("classification", 3) == Classification(3)
    assert make_task("image-classification", 2) == Classification(2)
    assert make_task("regression") == Regression()
    assert make_task("causal-lm") == CausalLM()
    with pytest.raises(UsageError, match="two classes or more, not None"):
        make_task("classification")
    with pytest.raises(UsageError, match="Unknown task 'ranking'; known are classification"):
        make_task("ranking")
