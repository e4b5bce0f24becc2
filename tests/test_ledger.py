"""The ledger: what is finished is not done again, and what is torn counts as not done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ird_search.ledger import Ledger, unit_key

KEY = unit_key({"mask": "ab12", "rate": 1e-3})


def test_a_key_is_the_inputs_and_not_their_order() -> None:
    assert unit_key({"rate": 1e-3, "mask": "ab12"}) == KEY
    assert len({KEY, unit_key({"mask": "ab12", "rate": 1e-4}), unit_key({"mask": "ab12"})}) == 3
    assert KEY == "8c782f1656bb7cf95f843b940029340027f7bffb602f8ee5c7ebbcc9dc425a6b"
    with pytest.raises(ValueError, match="JSON"):
        unit_key({"rate": float("nan")})


def test_units_come_back_in_another_process(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger")
    assert first.get(KEY) is None
    first.put(KEY, {"loss": 0.1 + 0.2, "metrics": {"f1": 1 / 3}})
    again = Ledger(tmp_path / "ledger")
    assert len(again) == 0
    assert again.get(KEY) == {"loss": 0.1 + 0.2, "metrics": {"f1": 1 / 3}} and len(again) == 1
    assert [p.name for p in (tmp_path / "ledger").iterdir()] == [f"{KEY}.json"]


def test_every_cut_and_every_edit_counts_as_not_done(tmp_path: Path) -> None:
    Ledger(tmp_path).put(KEY, {"loss": 0.25, "rate": 0.5})
    path = tmp_path / f"{KEY}.json"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert Ledger(tmp_path).get(KEY) is None
    path.write_bytes(whole.replace(b"0.25", b"0.24"))
    assert Ledger(tmp_path).get(KEY) is None
    path.write_bytes(b"[]")
    assert Ledger(tmp_path).get(KEY) is None
    path.write_bytes(b"\xff\xfe")
    ledger = Ledger(tmp_path)
    assert ledger.get(KEY) is None
    ledger.put(KEY, {"loss": 0.25})  # and it can be done again
    assert Ledger(tmp_path).get(KEY) == {"loss": 0.25}


def test_a_unit_under_another_key_is_not_taken(tmp_path: Path) -> None:
    Ledger(tmp_path).put(KEY, {"loss": 0.25})
    other = unit_key({"mask": "other"})
    (tmp_path / f"{KEY}.json").rename(tmp_path / f"{other}.json")
    assert Ledger(tmp_path).get(other) is None


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    Ledger(tmp_path).put(KEY, {"loss": 0.25})
    stored = json.loads((tmp_path / f"{KEY}.json").read_text())
    assert stored["key"] == KEY and stored["result"] == {"loss": 0.25}
