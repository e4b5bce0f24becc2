"""Settings: one place, legal ranges, all problems at once."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from ird_search.config import _ALIASES, DataConfig, SearchConfig, split_settings
from ird_search.errors import UsageError
from ird_search.settings import choices


def refused(config: Any = SearchConfig, **settings: Any) -> str:
    with pytest.raises(UsageError) as error:
        config(**settings)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"density": 0}, "density is 0; it must be above 0 and at most 1."),
        ({"density": 1.5}, "density is 1.5; it must be above 0 and at most 1."),
        ({"density": float("nan")}, "density is nan; it must be above 0 and at most 1."),
        ({"density": "0.1"}, "density is '0.1'; it must be a number."),
        ({"density": True}, "density is True; it must be a number."),
        ({"pool": 0}, "pool is 0; it must be at least 1."),
        ({"pool": 2.5}, "pool is 2.5; it must be a whole number."),
        ({"rounds": 65}, "rounds is 65; it must be at least 1 and at most 64."),
        ({"learning_rate": 0.0}, "learning_rate is 0; it must be above 0."),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0."),
        ({"weight_decay": -1}, "weight_decay is -1; it must be at least 0."),
        ({"eval_samples": 3}, "eval_samples is 3; it must be at least 4."),
        ({"embeddings": 1}, "embeddings is 1; it must be bool."),
        ({"device": None}, "device is None; it must be str."),
        ({"include": "query"}, "include is 'query'; it must be a list of strings."),
        ({"head": [3]}, "head is [3]; it must be a list of strings."),
        (
            {"strategy": "wlak"},
            "strategy is 'wlak'; it must be one of walk, ladder, grid, tpe, random, fish. Did you "
            "mean 'walk'?",
        ),
        ({"vary": "skip"}, "vary is 'skip'; it must be a list of criterion, ceiling, skip."),
        (
            {"controls": ["head", "randm"]},
            "controls holds 'randm'; known are random, fish, reversed, magnitude, shuffle, lora, "
            "full, head. Did you mean 'random'?",
        ),
        ({"ceiling": 0.5}, "ceiling is 0.5; it must be at least 1."),
        ({"min_samples": 600}, "min_samples (600) is larger than pool (512)."),
    ],
)
def test_each_setting_has_a_legal_range(settings: dict[str, Any], text: str) -> None:
    assert refused(**settings) == text


def test_all_problems_are_told_at_once() -> None:
    text = refused(density=0, pool=0, score="accuracy", seed=-1)
    assert text.startswith("4 problems:\n")
    for name in ("density is 0", "pool is 0", "score is 'accuracy'", "seed is -1"):
        assert f"  - {name}" in text
    assert "limit is 0" in refused(DataConfig, limit=0, max_length=0)


def test_every_setting_is_told_and_its_default_is_legal() -> None:
    for config in (SearchConfig, DataConfig):
        config()
        assert all(f.metadata["help"] for f in fields(config))


def test_a_config_is_a_value_and_plain_data() -> None:
    config = SearchConfig(include=["query", "value"], learning_rate=1e-5)  # type: ignore[arg-type]
    assert config.include == ("query", "value") and hash(config) == hash(config.replace())
    with pytest.raises(FrozenInstanceError):
        config.density = 0.1  # type: ignore[misc]
    text = yaml.safe_dump(config.to_dict())
    assert SearchConfig(**yaml.safe_load(text)) == config
    assert config.replace(density=0.1).density == 0.1 and config.density == 0.005
    with pytest.raises(UsageError):
        config.replace(density=2)


def test_keywords_find_their_config() -> None:
    search, data = split_settings({"density": 0.1, "label_column": "y"})
    assert search == {"density": 0.1} and data == DataConfig(label_column="y")
    with pytest.raises(UsageError) as error:
        split_settings({"densty": 0.1, "lable_column": "y"})
    assert "Unknown setting 'densty'. Did you mean 'density' or" in str(error.value)
    assert "Unknown setting 'lable_column'. Did you mean 'label_column'" in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lr", "Pass `learning_rate`."),
        ("epochs", "Pass `proxy_steps`, a number of optimizer steps."),
        ("num_train_epochs", "Pass `proxy_steps`, a"),
        ("sparsity", "Pass `density`, the fraction that is selected."),
        ("random_seed", "Pass `seed`."),
        ("tokenizer", "Pass it as `processor`."),
    ],
)
def test_names_of_other_libraries_lead_to_ours(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"Unknown setting {name!r}. {told}")):
        split_settings({name: 1})


def test_no_setting_is_taken_for_another_librarys() -> None:
    names = {f.name for each in (SearchConfig, DataConfig) for f in fields(each)}
    others = [name for words in _ALIASES.values() for name in words.split()]
    assert names.isdisjoint(others) and len(set(others)) == len(others)
    arguments = {"processor", "output", "eval_data"}
    assert {own.split("`")[1] for own in _ALIASES} <= names | arguments


@pytest.mark.parametrize(
    ("density", "parameters", "budget"), [(0.005, 1000, 5), (1.0, 7, 7), (1e-6, 1000, 0)]
)
def test_the_budget_is_the_nearest_whole_number(
    density: float, parameters: int, budget: int
) -> None:
    assert SearchConfig(density=density).budget(parameters) == budget


def test_fish_has_no_other_reading() -> None:
    SearchConfig(strategy="fish", criterion="fisher", floor=0.5)
    with pytest.raises(UsageError) as e:
        SearchConfig(strategy="fish", criterion="snr", ceiling=2.0, skip=1.0)
    assert len(e.value.problems) == 3
    assert "criterion is 'snr', but strategy is 'fish', which takes the largest" in str(e.value)


def test_choices_of_a_setting() -> None:
    hints = {f.name: f.type for f in fields(SearchConfig)}
    assert hints["strategy"] == "Strategy" and choices(int) == ()
    assert choices(get_type_hints(SearchConfig)["vary"]) == ("criterion", "ceiling", "skip")


@pytest.mark.parametrize("config", [SearchConfig, DataConfig])
def test_the_docs_list_every_setting_with_its_default_and_its_words(config: type) -> None:
    path = Path(__file__).parent.parent / "docs" / "settings.md"
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    hints = get_type_hints(config)
    for f in fields(config):
        (row,) = [r for r in rows if r.startswith(f"| `{f.name}` |")]
        assert f.metadata["help"] in row and all(word in row for word in choices(hints[f.name]))
        told = ", ".join(f.default) if isinstance(f.default, tuple) else f.default
        assert told in (None, "") or f"`{told}`" in row
