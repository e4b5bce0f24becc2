"""A planted problem: teacher and student differ in known coordinates, and the mask must find them.

The teacher tells two classes apart by a tanh network over 48 rare features (two or so are present
in a sample). The student is the teacher with the sign of all weights of six features turned: 48
of 384 candidates. Their magnitudes tell nothing, and a random mask holds an eighth of them.

Measured over seeds 0-9, share of the planted coordinates in a mask of 48:

    random      0.04-0.19, mean 0.11
    magnitude   0.08-0.19, mean 0.13
    FISH        0.23-0.54, mean 0.37       the mean over 32 random rows
    IRD         0.42-0.63, mean 0.50       128 rows narrowed to 32, by `walk` and by `ladder`
    Fisher      0.58-0.81, mean 0.68       the mean over all 400 rows

IRD is ahead of random and magnitude by 0.27 or more on every seed; the tests ask for 0.15, and for
0.3 in the mean. That the mean over all rows finds more still is so on this problem, where each row
tells about the features in it and no other, so a row given up is a part of the evidence given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import fisher_scores, search_mask
from ird_search.selection import random_subset, top_k

SEEDS = range(6)
FEATURES, HIDDEN, PLANTED = 48, 8, 6
BUDGET = PLANTED * HIDDEN
MARGIN, MEAN_MARGIN = 0.15, 0.3

SETTINGS: dict[str, Any] = {
    "density": PLANTED / FEATURES,
    "pool": 128,
    "min_samples": 32,
    "rounds": 3,
    "warmup_steps": 0,  # the head is the teacher's
    "proxy_steps": 10,
    "batch_size": 32,
    "learning_rate": 0.1,
    "seeds": 1,
    "device": "cpu",
}


@dataclass(frozen=True, eq=False)
class Planted:
    """A student, the teacher's labels, and where the two differ: bool [384]."""

    student: nn.Sequential
    rows: list[tuple[Tensor, int]]
    differs: Tensor

    def found(self, coords: Tensor) -> float:
        """The share of the planted coordinates in a mask of their number."""
        assert coords.numel() == BUDGET == int(self.differs.sum())
        return float(self.differs[coords].float().mean())


@cache
def planted(seed: int) -> Planted:
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, 2, bias=False)
    )
    body, head = net.get_parameter("0.weight"), net.get_parameter("2.weight")
    with torch.no_grad():
        body.copy_(torch.randn(HIDDEN, FEATURES, generator=g))
        to_first = 2 * torch.randn(1, HIDDEN, generator=g).sign()
        head.copy_(torch.cat([to_first, -to_first]))
        x = (torch.rand(400, FEATURES, generator=g) < 2 / FEATURES).float()
        labels = net(x).argmax(1)
        differs = torch.zeros(HIDDEN, FEATURES, dtype=torch.bool)
        differs[:, torch.randperm(FEATURES, generator=g)[:PLANTED]] = True
        body[differs] *= -1
    rows = [(row, int(label)) for row, label in zip(x, labels, strict=True)]
    return Planted(net, rows, differs.flatten())


@cache
def rivals(seed: int) -> tuple[float, float]:
    """What a random mask and the largest magnitudes find."""
    problem = planted(seed)
    drawn = random_subset(HIDDEN * FEATURES, BUDGET, seed=seed)
    magnitude = problem.student.get_parameter("0.weight").detach().abs().flatten()
    return problem.found(drawn), problem.found(top_k(magnitude, BUDGET))


def ahead(found: list[float]) -> None:
    """By the margin on every seed, and by more in the mean."""
    for rival in zip(*(rivals(seed) for seed in SEEDS), strict=True):
        gains = [ours - theirs for ours, theirs in zip(found, rival, strict=True)]
        assert min(gains) > MARGIN and sum(gains) / len(gains) > MEAN_MARGIN, (found, rival)


@pytest.mark.parametrize("strategy", ["walk", "ladder"])
def test_the_search_finds_what_differs(strategy: str) -> None:
    found = []
    for seed in SEEDS:
        problem = planted(seed)
        result = search_mask(
            problem.student, problem.rows, strategy=strategy, seed=seed, **SETTINGS
        )
        found.append(problem.found(result.mask.coords))
    ahead(found)


def test_the_fisher_scores_of_all_rows_find_what_differs() -> None:
    found = []
    for seed in SEEDS:
        problem = planted(seed)
        scores = fisher_scores(problem.student, problem.rows, device="cpu")
        found.append(problem.found(top_k(scores.by_parameter["0.weight"].flatten(), BUDGET)))
    ahead(found)


def test_rows_with_a_planted_feature_score_higher() -> None:
    """Why rows matter: a sample without a planted feature is told right by the student."""
    for seed in SEEDS:
        problem = planted(seed)
        scores = fisher_scores(problem.student, problem.rows, device="cpu").by_sample
        wrong = problem.differs.view(HIDDEN, FEATURES)[0]
        has = torch.tensor([bool(x[wrong].any()) for x, _ in problem.rows])
        assert scores[has].mean() > 3 * scores[~has].mean()
