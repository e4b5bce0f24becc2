"""The ledger: what is finished is not done again, what is torn counts as not done, and several
processes share the work."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from ird_search.ledger import Job, Ledger, Unit, unit_key

KEY = unit_key({"mask": "ab12", "rate": 1e-3})
NOTHING = torch.tensor([], dtype=torch.uint8)
WITH_TENSORS = Unit({"n": 2}, {"rows": torch.tensor([1, 5]), "bits": NOTHING})


def result(ledger: Ledger, key: str = KEY) -> object:
    unit = ledger.get("proxy", key)
    return None if unit is None else unit.result


def jobs(count: int, did: list[int], *, seconds: float = 0.0) -> list[Job]:
    """Jobs that note their number when they are done."""

    def job(i: int) -> Job:
        def do() -> Unit:
            time.sleep(seconds)
            did.append(i)
            return Unit({"i": i})

        return Job("proxy", unit_key({"i": i}), do)

    return [job(i) for i in range(count)]


# --- what is in it --------------------------------------------------------------------------------


def test_another_algorithm_finds_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ird_search.ledger.ALGORITHM", -1)
    assert unit_key({"mask": "ab12", "rate": 1e-3}) != KEY


def test_a_key_is_the_inputs_and_not_their_order() -> None:
    assert unit_key({"rate": 1e-3, "mask": "ab12"}) == KEY
    assert len({KEY, unit_key({"mask": "ab12", "rate": 1e-4}), unit_key({"mask": "ab12"})}) == 3
    assert KEY == "2efcd3f9d35f77398d5619684c6ffbeddb6023ee51086a1d1ee60952e2958fca"
    with pytest.raises(ValueError, match="JSON"):
        unit_key({"rate": float("nan")})


def test_units_come_back_in_another_process(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger")
    assert result(first) is None
    first.put("proxy", KEY, Unit({"loss": 0.1 + 0.2, "metrics": {"f1": 1 / 3}}))
    again = Ledger(tmp_path / "ledger")
    assert result(again) == {"loss": 0.1 + 0.2, "metrics": {"f1": 1 / 3}} and len(again) == 1
    assert [p.name for p in (tmp_path / "ledger").iterdir()] == [f"proxy-{KEY}.json"]


def test_a_unit_may_hold_tensors(tmp_path: Path) -> None:
    one = torch.arange(6)
    shared = Unit({}, {"a": one, "b": one, "view": one[::2]})
    for ledger in (Ledger(), Ledger(tmp_path)):
        ledger.put("narrowing", KEY, shared)
        found = ledger.get("narrowing", KEY)
        assert found is not None and found.result == {}
        assert {n: t.tolist() for n, t in found.tensors.items()} == {
            "a": [0, 1, 2, 3, 4, 5],
            "b": [0, 1, 2, 3, 4, 5],
            "view": [0, 2, 4],
        }
        ledger.drop("narrowing", KEY)
        assert ledger.get("narrowing", KEY) is None and len(ledger) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_kind_can_be_taken_away_and_listed(tmp_path: Path) -> None:
    for ledger in (Ledger(), Ledger(tmp_path)):
        ledger.put("fisher", KEY, WITH_TENSORS)
        ledger.put("proxy", KEY, Unit({"loss": 0.5}))
        assert [u.result for u in ledger.finished("proxy")] == [{"loss": 0.5}]
        ledger.clear("fisher")
        assert ledger.get("fisher", KEY) is None and result(ledger) == {"loss": 0.5}


def test_what_is_recorded_stays(tmp_path: Path) -> None:
    Ledger(tmp_path).put("proxy", KEY, Unit({"loss": 0.5, "seconds": 1.0}))
    late = Ledger(tmp_path)
    late.put("proxy", KEY, Unit({"loss": 0.5, "seconds": 9.0}))
    assert result(late) == result(Ledger(tmp_path)) == {"loss": 0.5, "seconds": 1.0}


# --- what is damaged ------------------------------------------------------------------------------


def test_every_cut_and_every_edit_counts_as_not_done(tmp_path: Path) -> None:
    Ledger(tmp_path).put("proxy", KEY, Unit({"loss": 0.25, "rate": 0.5}))
    path = tmp_path / f"proxy-{KEY}.json"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert result(Ledger(tmp_path)) is None
    for torn in (whole.replace(b"0.25", b"0.24"), b"[]", b"{}", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(torn)
        assert result(Ledger(tmp_path)) is None
    ledger = Ledger(tmp_path)
    ledger.put("proxy", KEY, Unit({"loss": 0.25}))  # and it can be done again
    assert result(Ledger(tmp_path)) == {"loss": 0.25}


def test_every_cut_and_every_flip_of_the_tensors_counts_as_not_done(tmp_path: Path) -> None:
    Ledger(tmp_path).put("narrowing", KEY, WITH_TENSORS)
    (path,) = tmp_path.glob(f"narrowing-{KEY}-*.safetensors")
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert Ledger(tmp_path).get("narrowing", KEY) is None
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert Ledger(tmp_path).get("narrowing", KEY) is None
    path.unlink()
    assert Ledger(tmp_path).get("narrowing", KEY) is None
    Ledger(tmp_path).put("narrowing", KEY, WITH_TENSORS)
    assert path.read_bytes() == whole


def test_a_unit_under_another_key_is_not_taken(tmp_path: Path) -> None:
    Ledger(tmp_path).put("proxy", KEY, Unit({"loss": 0.25}))
    other = unit_key({"mask": "other"})
    (tmp_path / f"proxy-{KEY}.json").rename(tmp_path / f"proxy-{other}.json")
    assert result(Ledger(tmp_path), other) is None


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    Ledger(tmp_path).put("proxy", KEY, Unit({"loss": 0.25}))
    stored = json.loads((tmp_path / f"proxy-{KEY}.json").read_text())
    assert stored["key"] == KEY and stored["result"] == {"loss": 0.25}


# --- who does it ----------------------------------------------------------------------------------


def test_jobs_are_done_once_and_told_once(tmp_path: Path) -> None:
    did, told = list[int](), list[str]()
    for ledger in (Ledger(), Ledger(tmp_path)):
        wanted = jobs(3, did)
        found = ledger.finish([*wanted, wanted[0]], on_done=lambda key, _: told.append(key))
        assert [u.result["i"] for u in found] == [0, 1, 2, 0]
        ledger.finish(wanted)
    assert did == [0, 1, 2] * 2 and told == [job.key for job in wanted] * 2


def test_a_failing_job_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Unit:
        raise KeyboardInterrupt

    ledger = Ledger(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ledger.finish([Job("proxy", KEY, broken)])
    assert len(ledger) == 0
    with ledger.claimed(KEY) as mine:
        assert mine


def test_one_that_waits_leaves_the_work_to_others(tmp_path: Path) -> None:
    did, other = list[int](), list[int]()
    waiting = threading.Thread(target=lambda: Ledger(tmp_path).finish(jobs(2, did), wait=True))
    waiting.start()
    Ledger(tmp_path).finish(jobs(2, other))
    waiting.join(timeout=30)
    assert not waiting.is_alive() and did == [] and other == [0, 1]


class Held(Ledger):
    """A ledger all of whose claims another process holds."""

    def claimed(self, key: str, *, again: bool = False):  # type: ignore[no-untyped-def]
        return super().claimed(key, again=True) if again else _never()


class _never:
    def __enter__(self) -> bool:
        return False

    def __exit__(self, *args: object) -> None:
        return None


def test_a_claim_that_comes_to_nothing_is_taken_over(tmp_path: Path) -> None:
    did: list[int] = []
    found = Held(tmp_path, lease=0.05).finish(jobs(2, did))
    assert [u.result["i"] for u in found] == [0, 1] and did == [0, 1]
