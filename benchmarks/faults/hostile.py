"""Files that cost much, hang or deceive, and what refusing them takes."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import Row
from benchmarks.faults.count import Count, unlike
from benchmarks.record import peak_of
from ird_search.artifact.container import Layout, table_of
from ird_search.artifact.parts import Part
from ird_search.artifact.plans import DELTA, DeltaPlan, MaskPlan
from ird_search.errors import ArtifactError, ResourceError
from tests.artifacts import KINDS, PROVENANCE, Kind, forged, packed, taken_apart
from tests.test_refused_files import HOSTILE as HEADERS

MEGABYTES = 200.0
"""What refusing a hostile file may take, beside a second."""
PATIENCE = 60.0
"""Seconds after which a reader is taken to hang."""
LONG = "x" * 15_000_000 + "😀"
"""One character that makes Python keep all of them in four bytes each."""

Maker = Callable[[Path, Kind], Any]
"""Puts a hostile file at a path."""


def _written(make: Callable[[Kind], bytes]) -> Maker:
    return lambda path, kind: path.write_bytes(make(kind))


def _plain(header: Any) -> bytes:
    return packed(json.dumps(header, ensure_ascii=False).encode(errors="surrogatepass"))


def _said(kind: Kind, said: Any) -> bytes:
    """A file with this for its metadata, a text; or with this for the provenance in it."""
    if not isinstance(said, str):
        meta = {"format_version": "1.0", "provenance": said}
        said = json.dumps(meta, ensure_ascii=False)
    return _plain({"__metadata__": {kind.form.key: said}})


def _claims(kind: Kind, parts: Sequence[Part]) -> bytes:
    """A file that declares these parts, with everything set right; what it stores is zeros."""
    plan: Any = MaskPlan(tuple(parts))
    if kind.form is DELTA:
        masked = {part.name: "F32" for part in parts if part.count}
        plan = DeltaPlan(tuple(parts), masked, {}, "0" * 64)
    meta, layouts = {"format_version": "1.0", "provenance": {}, **plan.described()}, plan.layouts()
    payload = bytes(min(10**7, sum(layout.nbytes for layout in layouts.values())))
    return forged(kind.form, table_of(layouts), meta, payload)


def _late(kind: Kind, *parts: Part) -> bytes:
    """A file that declares these parts, and is wrong in the last thing that is looked at."""
    return _claims(kind, [*parts, Part("~", (21,), 5)])  # whose bits are 0


def _changed(path: Path, kind: Kind, **changed: Any) -> None:
    """A sound file with other metadata, and hashes as they should be."""
    kind.save(path, PROVENANCE)
    header, meta, payload = taken_apart(path)
    path.write_bytes(forged(kind.form, header, {**meta, **changed}, payload))


def _nested(depth: int) -> dict[str, Any]:
    """Lists in lists in an object."""
    inner: Any = []
    for _ in range(depth):
        inner = [inner]
    return {"a": inner}


def _moved(first: int, second: int) -> Maker:
    """The first tensor of a sound file begins and ends elsewhere."""

    def make(path: Path, kind: Kind) -> None:
        kind.save(path, {})
        header, meta, payload = taken_apart(path)
        start, end = header["a.idx::idx"]["data_offsets"]
        header["a.idx::idx"]["data_offsets"] = [start + first, end + second]
        path.write_bytes(forged(kind.form, header, meta, payload))

    return make


def _key_twice(path: Path, kind: Kind) -> None:
    kind.save(path, {})
    header, meta, payload = taken_apart(path)
    data = forged(kind.form, header, meta, payload)
    raw = data[8 : len(data) - len(payload)].rstrip()
    again = json.dumps(header["a.idx::idx"]).encode()
    path.write_bytes(packed(raw[:-1] + b',"a.idx::idx":' + again + b"}", payload))


def _sparse(path: Path, kind: Kind) -> None:
    path.touch()
    os.truncate(path, 100 * 2**30)


def _sparse_and_sound(path: Path, kind: Kind) -> None:
    """100 GB of holes behind a header that declares them."""
    layout = Layout("U8", (100 * 2**30,))
    if kind.form is DELTA:
        plan: Any = DeltaPlan((), {}, {"w": layout}, "0" * 64)
    else:
        plan = MaskPlan((Part("w", (2**45,), 25 * 2**29),))  # int64 indices
    meta = {"format_version": "1.0", "provenance": {}, **plan.described()}
    header = forged(kind.form, table_of(plan.layouts()), meta, b"")
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(layout.nbytes for layout in plan.layouts().values()))


def _most_of_memory(kind: Kind) -> bytes:
    """A few bytes that select as many parameters as fit into memory just so, before the copies."""
    count = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10
    return _claims(kind, [Part("w", (count,), count)])


def _socket(path: Path, kind: Kind) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.bind(path.name)
    finally:
        os.chdir(here)


def _saved(path: Path, **options: Any) -> None:
    torch.save({"w": torch.ones(2)}, path, **options)


HOSTILE: dict[str, Maker] = {
    **{
        f"header: {name}": _written(lambda kind, make=make: make())
        for name, make in HEADERS.items()
    },
    "header larger than the file": _written(lambda kind: (999).to_bytes(8, "little") + b"{}"),
    "overlapping tensors": _moved(-4, -4),
    "a hole between tensors": _moved(4, 4),
    "negative offsets": _moved(-(2**40), -(2**40)),
    "offsets beyond 2^63": _moved(2**63, 2**63),
    "a tensor that ends before it begins": _moved(8, -8),
    "a key twice": _key_twice,
    "a key twice in the metadata": _written(lambda kind: _said(kind, '{"a":1,"a":1}')),
    "a key of 10 MB": _written(lambda kind: packed({"k" * 10_000_000: 1})),
    "a name of 5 MB": _written(lambda kind: _claims(kind, [Part("n" * 5_000_000, (1,), 0)])),
    "a lone surrogate for a header key": _written(lambda kind: packed(b'{"\\ud800":1}')),
    "a lone surrogate for metadata": _written(lambda kind: _said(kind, "\ud800")),
    "a lone surrogate for a name": lambda path, kind: _changed(
        path, kind, order=["\ud800"], params={"\ud800": {"shape": [1], "count": 0}}
    ),
    "15 MB of letters and an emoji": _written(lambda kind: _plain({LONG: 1})),
    "15 MB of metadata and an emoji": _written(lambda kind: _said(kind, LONG)),
    "15 MB of provenance and an emoji": _written(lambda kind: _said(kind, {"a": LONG})),
    "NaN in the metadata": _written(lambda kind: _said(kind, '{"a":NaN}')),
    "Infinity in the metadata": _written(lambda kind: _said(kind, '{"a":-Infinity}')),
    "1e999 in the provenance": _written(
        lambda kind: _said(kind, '{"format_version":"1.0","provenance":{"a":1e999}}')
    ),
    "a number of 10^5 digits": _written(lambda kind: _said(kind, '{"a":%s}' % ("9" * 10**5))),
    "100k-deep metadata": _written(
        lambda kind: _said(kind, '{"provenance":' + "[" * 100_000 + "]" * 100_000 + "}")
    ),
    **{
        f"provenance {depth} deep": lambda path, kind, depth=depth: _changed(
            path, kind, provenance=_nested(depth)
        )
        for depth in (99, 480, 900)
    },
    "400,000 sizes in a shape": _written(
        lambda kind: packed({"a": {"dtype": "U8", "shape": [1] * 400_000, "data_offsets": [0, 1]}})
    ),
    "400,000 sizes in the metadata": lambda path, kind: _changed(
        path, kind, params={"a.idx": {"shape": [1] * 400_000, "count": 1}}
    ),
    "sizes whose product overflows": lambda path, kind: _changed(
        path, kind, order=["a"], params={"a": {"shape": [2**48] * 8, "count": 1}}
    ),
    "such sizes beside a 0": _written(
        lambda kind: _claims(kind, [Part("w", (0, *[2**48] * 3), 0)])
    ),
    "a count of 2^63": lambda path, kind: _changed(path, kind, count=2**63),
    "2^40 parameters in a few bytes": _written(
        lambda kind: _claims(kind, [Part("w", (2**40,), 2**40)])
    ),
    "most of this machine's memory in a few bytes": _written(_most_of_memory),
    "100,000 tensors and a byte too much": _written(
        lambda kind: _claims(kind, [Part(f"n{i}", (1,), 0) for i in range(100_000)]) + b"\0"
    ),
    "a sparse file of 100 GB": _sparse,
    "a sparse file of 100 GB with a sound header": _sparse_and_sound,
    "a pipe": lambda path, kind: os.mkfifo(path),
    "a socket": _socket,
    "a device": lambda path, kind: path.symlink_to("/dev/zero"),
    "a part of /proc": lambda path, kind: path.symlink_to("/proc/self/mem"),
    "a part of /proc that waits": lambda path, kind: path.symlink_to("/proc/kmsg"),
    "a link to itself": lambda path, kind: path.symlink_to(path),
    "an empty directory": lambda path, kind: path.mkdir(),
    "a directory for a file": lambda path, kind: (path / kind.form.file_name).mkdir(parents=True),
    "torch.save": lambda path, kind: _saved(path),
    "torch.save as before 1.6": lambda path, kind: _saved(
        path, _use_new_zipfile_serialization=False
    ),
    "a sound file, compressed": lambda path, kind: (
        kind.save(path, {}),
        path.write_bytes(gzip.compress(path.read_bytes())),
    ),
    "a pointer of Git LFS": _written(
        lambda kind: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    ),
    "a web page": _written(lambda kind: b"<!DOCTYPE html><html><body>Sign in</body></html>"),
}
"""Files that cost much, hang, or deceive where a reader takes them as they come."""

DEAREST: dict[str, Maker] = {
    "100,000 tensors, wrong in the last": _written(
        lambda kind: _late(kind, *(Part(f"{i:05}", (1,), 0) for i in range(99_999)))
    ),
    "as many indices as a header holds, wrong in the last": _written(
        lambda kind: _late(
            kind,
            *(Part(f"{i:05}", (64,), 1) for i in range(38_000 if kind.form is DELTA else 60_000)),
        )
    ),
}
"""As much as the limits admit, and wrong only in the last thing that is looked at."""


def hostile_files(
    place: Path,
    makers: Mapping[str, Maker] = HOSTILE,
    what: str = "hostile files, as a mask and as a delta",
    seconds_each: float = 1.0,
) -> Row:
    """Each in a process of its own, which has imported everything, for a mask and for a delta."""
    count, took, needed = Count(), [0.0], [0.0]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for noun, kind in KINDS.items():
        for number, (name, make) in enumerate(makers.items()):
            path = place / f"hostile-{noun}-{number}"
            make(path, kind)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_read_apart, args=(noun, path, sender))
            process.start()
            sender.close()
            problem, seconds, megabytes = _answer(receiver)
            process.kill()
            process.join()
            if path.is_file() and not path.is_symlink():
                path.unlink()
            took.append(seconds)
            needed.append(megabytes)
            slow = seconds > seconds_each or megabytes > MEGABYTES
            spent = f"took {seconds:.2f} s and {megabytes:.0f} MB" if slow else ""
            count.add(f"{noun}, {name}", problem or spent)
    return count.row(
        f"{len(makers)} {what}",
        f"refused in {seconds_each:.0f} s and {MEGABYTES:.0f} MB",
        {"seconds of CPU, worst": max(took), "MB, worst": max(needed)},
    )


def _answer(receiver: Any) -> tuple[str, float, float]:
    if not receiver.poll(PATIENCE):
        return "did not end", PATIENCE, 0.0
    try:
        answer: tuple[str, float, float] = receiver.recv()
        return answer
    except EOFError:
        return "the process died", 0.0, 0.0


def _read_apart(noun: str, path: Path, sender: Any) -> None:
    """In the process: what is wrong with how reading ends, seconds and MB."""
    torch.set_num_threads(1)
    refusals: Any = (ArtifactError, ResourceError)
    problem, seconds = "", 0.0

    def call() -> None:
        nonlocal problem, seconds
        start = time.process_time()  # others use this machine, too; who hangs is found anyway
        problem = unlike(lambda: KINDS[noun].load(path), error=refusals)
        seconds = time.process_time() - start

    megabytes = peak_of(call)
    sender.send((problem, seconds, megabytes))
