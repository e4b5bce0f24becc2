"""What must not leak: training rows into the evaluation, temporary files, an excluded row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import search_mask
from ird_search.config import DataConfig, SearchConfig
from ird_search.errors import DataError, UsageError
from ird_search.problem import Problem, make_problem
from tests.tiny import save_tiny_bert

SETTINGS: dict[str, Any] = {
    "density": 0.2,
    "pool": 20,
    "min_samples": 20,
    "rounds": 1,
    "proxy_steps": 2,
    "seeds": 1,
    "learning_rate": 0.01,
    "device": "cpu",
}


def rows(count: int, seed: int = 0) -> list[tuple[Tensor, int]]:
    made = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return [(x, int(x[0] > 0)) for x in made]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def problem(data: Any, **more: Any) -> Problem:
    config = SearchConfig(density=0.1, pool=10, min_samples=4, device="cpu")
    return make_problem(net(), data, options=DataConfig(), config=config, **more)


@pytest.mark.parametrize("name", ["train", "validation", "dev"])
def test_a_lone_split_is_never_both_sides(name: str) -> None:
    p = problem({name: rows(80)})
    sides = [set(s.ids.tolist()) for s in (p.train, p.choose, p.verdict)]
    assert sum(map(len, sides)) == 80 == len(set().union(*sides))


def test_evaluation_data_give_their_validation_split() -> None:
    held_out = {"train": rows(30, 1), "validation": rows(12, 2)}
    p = problem(rows(40), eval_data=held_out)
    assert len(p.choose) + len(p.verdict) == 12


class Steep(nn.Module):
    """A gradient that is not finite at one value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        bad = (x.abs().sum(-1, keepdim=True) > 1e6).to(x.dtype)
        return self.head(torch.tanh(self.body(x.clamp(-9, 9)))) / (1 - bad)


def test_a_row_without_a_finite_gradient_is_not_among_the_chosen() -> None:
    data = rows(160)
    data[3] = (torch.full((4,), 1e9), 1)
    # every training row is in the pool
    settings = {**SETTINGS, "pool": 128, "min_samples": 128, "batch_size": 1, "warmup_steps": 0}
    result = search_mask(Steep(), data[:120] + rows(8, 5), eval_data=data[120:], **settings)
    assert result.provenance["fisher"]["excluded_samples"] == [3]
    assert sorted(result.samples.ids.tolist()) == [i for i in range(128) if i != 3]
    assert bool(result.samples.scores.isfinite().all())
    assert result.provenance["notes"][0].startswith("1 of 128 pool samples were left out")


def test_text_beside_a_column_of_no_known_name_is_asked_about(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny", head=False)
    data = [{"text": "good", "intent": "buy"}, {"text": "bad", "intent": "sell"}] * 20
    with pytest.raises(DataError, match=r"label_column \(--label-column intent\)"):
        search_mask(tmp_path / "tiny", data, **SETTINGS)


def test_a_result_overwrites_nothing(tmp_path: Path) -> None:
    result = search_mask(net(), rows(80), **SETTINGS)
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(UsageError, match=r"holds report\.md"):
        result.save(tmp_path)
    assert (tmp_path / "report.md").read_text() == "mine"
    assert result.save(tmp_path / "new").name == "mask.safetensors"


def test_a_write_that_was_killed_does_not_block_the_directory(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.0a1b2c.tmp").write_text("half")
    search_mask(net(), rows(80), output=tmp_path, **SETTINGS)
    assert (tmp_path / "mask.safetensors").exists()
