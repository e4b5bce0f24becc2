"""Memory that runs out: in the Fisher pass, at any of its steps, and in a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.faults import Row
from benchmarks.faults.tiny import Bench, bench, command, same_files
from ird_search.errors import ResourceError
from ird_search.fisher import FisherMatrix, Loop, make_engine
from ird_search.fisher.engine import Contribution
from ird_search.parameters import ParameterSpace
from ird_search.samples import Batch, SampleSet
from ird_search.task import Classification

FULL = 75


def campaign() -> list[Row]:
    """The rows."""
    with bench() as b:
        return [injected(), limited(limits=40), whole_runs(b, runs=60)]


# --- one Fisher pass ------------------------------------------------------------------------------


class Short:
    """An engine that runs out of memory on more than so many rows, once or for good.

    Args:
        fails: at which calls; at all that are too large by default.
    """

    def __init__(self, engine: object, rows: int, fails: tuple[int, ...] | None = None) -> None:
        self.engine, self.rows, self.fails = engine, rows, fails
        self.path, self.names = "short", engine.names  # type: ignore[attr-defined]
        self.calls, self.done = 0, list[int]()

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        self.calls += 1
        if len(batch) > self.rows and (self.fails is None or self.calls in self.fails):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        for c in self.engine.gradients(batch):  # type: ignore[attr-defined]
            self.done += batch.rows[c.part].tolist()
            yield c


def fisher_problem(
    width: int = 16, rows: int = 32, tokens: int = 1
) -> tuple[nn.Module, Classification, ParameterSpace, SampleSet]:
    """A network on random numbers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
    inputs = tuple({"input": torch.randn(width)} for _ in range(rows))
    samples = SampleSet(inputs, torch.arange(rows) % 2, torch.arange(rows))
    return (
        net,
        Classification(2),
        ParameterSpace.of(net, [n for n, _ in net.named_parameters()]),
        samples,
    )


def injected(*, sizes: Sequence[int] = range(8)) -> Row:
    """Batches of 8 rows; each of the sizes 0 … 7 is the largest that fits, each call may fail."""
    net, task, space, samples = fisher_problem()
    taps = make_engine(net, task, space, example=samples.batch(torch.arange(4)))
    loop = Loop(net, task, space.names)
    true = FisherMatrix(taps, samples, space, tokens=8, cache_bytes=0).marginals()
    wrong, tried = list[str](), 0
    for most in sizes:
        for fails in (None, *((n,) for n in range(1, 5))):
            tried += 1
            short = Short(taps, most, fails)
            matrix = FisherMatrix(short, samples, space, tokens=8, cache_bytes=0, fallback=loop)
            found = matrix.marginals()
            close = torch.allclose(found.columns, true.columns, rtol=1e-5)
            once = sorted(short.done) == list(range(32)) or (most == 0 and len(short.done) < 32)
            if not close or not once:
                wrong.append(f"{most} rows fit, {fails}: close {close}, once {once}")
    try:
        FisherMatrix(Short(taps, 0), samples, space, tokens=8, cache_bytes=0).marginals()
        wrong.append("where nothing fits, there is an answer")
    except ResourceError:
        tried += 1
    promise = "batches halve down to 1, then the loop; each row is computed once; the same sums"
    fault = "an accelerator's out-of-memory error at any call of the Fisher pass"
    return Row(fault, promise, tried, tried - len(wrong), {}, tuple(wrong[:5]))


LIMITED = """
import json, resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from benchmarks.faults.memory import fisher_problem
from ird_search.errors import ResourceError, out_of_memory
from ird_search.fisher import FisherMatrix, Loop, make_engine
net, task, space, samples = fisher_problem(width=1024, rows=4096)
taps = make_engine(net, task, space, example=samples.batch(torch.arange(4)))
def matrix(tokens):
    loop = Loop(net, task, space.names)
    return FisherMatrix(taps, samples, space, tokens=tokens, cache_bytes=0, fallback=loop)
true = matrix(512).marginals().columns
def held():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for i in range(int(sys.argv[1])):
    # tens of megabytes: what 4,096 rows of 1,024 numbers need is three times as much
    resource.setrlimit(resource.RLIMIT_AS, (held() + (4 + 3 * i) * 2**20, -1))
    m = matrix(2**22)
    try:
        found = m.marginals().columns
        said = "same" if torch.allclose(found, true, rtol=1e-4, atol=1e-12) else "differs"
    except (ResourceError, RuntimeError, MemoryError) as problem:
        full = isinstance(problem, ResourceError) or out_of_memory(problem)
        said = "75" if full else f"{type(problem).__name__}: {problem}"
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(json.dumps([4 + 3 * i, said, m._passes.most]), flush=True)
"""


def limited(*, limits: int) -> Row:
    """The address space ends so many megabytes above what the process has."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limits)], capture_output=True, text=True, check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [f"{mb} MB: {said}" for mb, said, _ in found if said not in ("same", "75")]
    wrong += [done.stderr[-300:]] * (done.returncode != 0)
    halved = [most for _, said, most in found if said == "same" and most]
    promise = "smaller batches and the same sums, or code 75 with advice"
    figures = {
        "went on in smaller batches": len(halved),
        "gave up with code 75": sum(f[1] == "75" for f in found),
    }
    fault = "the address space of a Fisher pass is limited (RLIMIT_AS)"
    return Row(fault, promise, len(found), len(found) - len(wrong), figures, tuple(wrong[:5]))


# --- a whole run ----------------------------------------------------------------------------------


def whole_runs(b: Bench, *, runs: int) -> Row:
    """So many runs, each with two megabytes more than the one before."""
    wrong, gave_up = list[str](), 0
    for i in range(runs):
        with TemporaryDirectory(dir=b.place) as folder:
            output = Path(folder) / "run"
            ended = b.runner.run(command(b.place, output), limits={"AS": i * 2**21})
            if ended.code == 0:
                wrong += [f"{2 * i} MB: other bytes"] * bool(same_files(output, b.whole)[:1])
                continue
            gave_up += 1
            begun = (output / "config.yaml").exists()
            again = b.runner.run(["resume", output] if begun else command(b.place, output))
            text = ", ".join(same_files(output, b.whole)[:1])
            if ended.code != FULL or again.code or text:
                codes = f"code {ended.code}, then {again.code}"
                wrong.append(f"{2 * i} MB: {codes} {text}: {ended.err[-300:]}")
    promise = "code 75 with advice, and with more memory a resume comes to the same mask"
    fault = "the address space of a whole run is limited (RLIMIT_AS)"
    figures = {"gave up with code 75": gave_up}
    return Row(fault, promise, runs, runs - len(wrong), figures, tuple(wrong[:5]))
