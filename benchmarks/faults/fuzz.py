"""A fuzzer of the reader, led by coverage: what takes a new way through it is mutated further.

    python -m benchmarks.faults.fuzz --seconds 600 --seed 7

A mutation is one of bytes, or of meaning: a value of the metadata, an entry of the table, a number
among the stored ones. Most of the latter are repaired as a forger would do it, with hashes,
lengths and table set right, since otherwise no mutation would get past the first hash.

Whatever comes of it, the reader may refuse the file, or return what the file holds; and it may
return that only if saving it again gives the same bytes. Everything else is a finding.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import ird_search.artifact
from ird_search.artifact import DeltaFile, MaskFile, inspect_file
from ird_search.artifact.container import canonical, encode, header_of, sha256, table_of
from ird_search.artifact.plans import (
    DELTA,
    MASK,
    DeltaPlan,
    MaskPlan,
    stored_in_delta,
    stored_in_mask,
)
from ird_search.errors import ArtifactError, ResourceError
from tests.artifacts import KINDS, PROVENANCE

READER = str(Path(ird_search.artifact.__file__).parent)

NUMBERS = [0, 1, -1, 2, 7, 8, 9, 31, 32, 33, 200, 255, 256, 2**31, 2**48, 2**48 + 1, 2**63, 2**64]
VALUES = [*NUMBERS, 0.5, 1.0, 1e308, -0.0, "", "a", "a.idx", "F32", "BOOL", "I64", "U32", "\ud800"]
VALUES += ["0" * 64, "x" * 2000, "a\x1b[2J", "__samples__", None, True, [], {}, [[]], [1] * 9]

Arc = tuple[str, int, int]
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass
class Findings:
    """What a fuzzer saw.

    Args:
        executions: files read.
        refused: of them, with the error that is promised.
        accepted: of them, and the same bytes came of saving again.
        arcs: ways from one line of the reader to another.
        wrong: what should not have happened, with how often.
    """

    executions: int = 0
    refused: int = 0
    accepted: int = 0
    arcs: set[Arc] = field(default_factory=set)
    wrong: Counter[str] = field(default_factory=Counter)


def fuzz(*, seconds: float = 1e9, executions: int = 10**12, seed: int = 0) -> Findings:
    """Read mutations of a mask and of a delta, until the time or the number is spent."""
    rng, found = random.Random(seed), Findings()
    end = time.monotonic() + seconds
    with TemporaryDirectory() as folder:
        place = Path(folder) / "file"
        corpus = list(_seeds(place))
        for data in corpus:
            _read(place, data, found)
        while found.executions < executions and time.monotonic() < end:
            data = rng.choice(corpus)
            for _ in range(rng.choice((1, 1, 2, 4))):
                data = rng.choice(_MUTATIONS)(data, rng)
            before = len(found.arcs)
            _read(place, data, found)
            if len(found.arcs) > before and len(data) < 20_000:
                corpus.append(data)
    return found


def resaved(file: MaskFile | DeltaFile) -> bytes:
    """The bytes that saving what was read gives, with what the file says of its writer."""
    if isinstance(file, MaskFile):
        plan, stored = MaskPlan.of(file.mask, file.samples), stored_in_mask(file.mask, file.samples)
        return encode(MASK, plan, stored, file.metadata)
    return encode(DELTA, DeltaPlan.of(file.delta), stored_in_delta(file.delta), file.metadata)


# --- reading and watching -----------------------------------------------------------------------


def _seeds(place: Path) -> Iterator[bytes]:
    for kind in KINDS.values():
        for provenance in ({}, PROVENANCE):
            kind.save(place, provenance)
            yield place.read_bytes()


def _read(place: Path, data: bytes, found: Findings) -> None:
    """Read a file that holds `data`, and judge what comes of it."""
    place.write_bytes(data)
    found.executions += 1
    try:
        with _watched(found.arcs):
            file = inspect_file(place)
    except (ArtifactError, ResourceError):
        found.refused += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        found.wrong[f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}"] += 1
    else:
        if resaved(file) == data and file.sha256 == sha256(data):
            found.accepted += 1
        else:
            found.wrong["accepted, and other bytes come of saving it again"] += 1


@contextmanager
def _watched(arcs: set[Arc]) -> Iterator[None]:
    """Note every step from line to line that is taken within the reader."""

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        name, last = frame.f_code.co_filename, -frame.f_code.co_firstlineno
        if not name.startswith(READER):
            return None

        def stepped(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                arcs.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return stepped

        return stepped

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)


# --- mutations of bytes -------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """One byte becomes another."""
    place = rng.randrange(len(data)) if data else 0
    return data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """Up to eight bits change, anywhere."""
    bits = int.from_bytes(data, "little")
    for place in rng.sample(range(8 * len(data)), rng.randint(1, 8)):
        bits ^= 1 << place
    return bits.to_bytes(len(data), "little")


def insert(data: bytes, rng: random.Random) -> bytes:
    """Some bytes come in, with or without the length being set right."""
    place = rng.randrange(len(data) + 1)
    return _relength(data[:place] + rng.randbytes(rng.randint(1, 16)) + data[place:], data, rng)


def delete(data: bytes, rng: random.Random) -> bytes:
    """Some bytes go."""
    place = rng.randrange(len(data))
    return _relength(data[:place] + data[place + rng.randint(1, 16) :], data, rng)


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two blocks of different contents change places."""
    size = rng.randint(1, len(data) // 4)
    for _ in range(100):
        a, b = sorted(rng.sample(range(len(data) - size + 1), 2))
        if b - a >= size and data[a : a + size] != data[b : b + size]:
            return (
                data[:a]
                + data[b : b + size]
                + data[a + size : b]
                + data[a : a + size]
                + (data[b + size :])
            )
    return flip(data, rng)


def append(data: bytes, rng: random.Random) -> bytes:
    """Something follows the end."""
    return data + rng.choice((b"\0", rng.randbytes(rng.randint(1, 64)), data))


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A block becomes random, or zeros: a page that never reached the disk."""
    size = rng.randint(1, min(512, len(data)))
    place = rng.randrange(len(data) - size + 1)
    block = rng.choice((bytes(size), rng.randbytes(size)))
    if data[place : place + size] == block:
        return flip(data, rng)
    return data[:place] + block + data[place + size :]


BYTES: tuple[Mutation, ...] = (flip, flip_bits, insert, delete, swap, append, overwrite)


def _relength(new: bytes, old: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5 or len(new) < 8:
        return new
    length = int.from_bytes(old[:8], "little") + len(new) - len(old)
    return max(length, 0).to_bytes(8, "little") + new[8:]


# --- mutations of meaning -----------------------------------------------------------------------


def change_meaning(data: bytes, rng: random.Random) -> bytes:
    """A value of metadata or table becomes another; what follows from it is set right, or not."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
        said = header.pop("__metadata__")
        form = MASK if MASK.key in said else DELTA
        metadata, payload = json.loads(said[form.key]), data[end:]
        part = rng.choice((metadata, metadata, metadata, header, None))
        if part is None:
            payload = _change_payload(payload, rng)
        else:
            _change_part(part, rng)
        metadata["payload_sha256"] = sha256(payload)
        if rng.random() < 0.8:
            plan = form.declared(metadata)
            metadata |= plan.described()
            if part is not header:
                header = table_of(plan.layouts())
                size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
                if size > 10_000 or 10**6 < plan.count < 10**10:
                    return data  # it may be sound, and costly
                payload = payload.ljust(size, b"\0")[:size]
                metadata["payload_sha256"] = sha256(payload)
        return header_of(form, header, canonical(metadata)) + payload
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return flip(data, rng)  # what other mutations left is no such file any more


def _change_part(part: Any, rng: random.Random) -> None:
    """Go down at random, and there put, take away, double or rename something."""
    key = rng.choice(_keys(part))
    while isinstance(part[key], dict | list) and _keys(part[key]) and rng.random() < 0.7:
        part = part[key]
        key = rng.choice(_keys(part))
    change = rng.randrange(5)
    if change == 0:
        part[key] = rng.choice(VALUES)
    elif change == 1 and isinstance(part[key], int):
        part[key] += rng.choice((-1, 1, 8, 2**31))
    elif change == 2:
        del part[key]
    elif change == 3 and isinstance(part, list):
        part.insert(rng.randrange(len(part) + 1), rng.choice((*part, *VALUES)))
    elif isinstance(part, dict):
        part[str(rng.choice((*VALUES, *part)))] = part[key]


def _keys(part: Any) -> list[Any]:
    return list(part) if isinstance(part, dict) else list(range(len(part)))


def _change_payload(payload: bytes, rng: random.Random) -> bytes:
    """Another number in the place of a stored one."""
    width = rng.choice((1, 2, 4, 8))
    place = rng.randrange(0, max(1, len(payload) - width + 1), width)
    number = rng.choice(NUMBERS) % 2 ** (8 * width)
    return payload[:place] + number.to_bytes(width, "little") + payload[place + width :]


_MUTATIONS: tuple[Mutation, ...] = (*BYTES, *(change_meaning,) * 3 * len(BYTES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = fuzz(seconds=options.seconds, seed=options.seed)
    print(
        f"{found.executions:,} files read, {found.accepted:,} accepted, {len(found.arcs):,} arcs "
        f"reached, {found.wrong.total()} findings"
    )
    for text, count in found.wrong.most_common():
        print(f"{count:>6} {text}")


if __name__ == "__main__":
    main()
