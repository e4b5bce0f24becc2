"""The command line: `ird-search run | resume | status | demo | inspect | verify | …`.

Only light modules are imported here at the top: `--help` must answer at once, and torch takes
seconds. What a command needs it imports when it runs.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import signal
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ird_search.command import (
    EXIT_CODES,
    Base,
    JsonFlag,
    Output,
    Revision,
    Sectioned,
    Written,
    guarded,
    require_finished,
    resumable,
    with_settings,
)
from ird_search.config import DataConfig, SearchConfig, split_settings
from ird_search.errors import ResourceError, UsageError, out_of_memory

app = typer.Typer(
    name="ird-search",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Which few parameters should I train, and which samples tell me?",
)


def _demo_goes_on(output: Path, seed: int, **_: Any) -> str:
    return f"Go on with: ird-search demo --output {shlex.quote(str(output))} --seed {seed}"


@app.command(
    cls=Sectioned, epilog=EXIT_CODES, short_help="Search a mask for a model on a data set."
)
@resumable
@with_settings(DataConfig, SearchConfig)
def run(
    output: Output,
    settings: dict[str, Any],
    model: Annotated[str | None, typer.Option(help="a model directory or a hub id")] = None,
    data: Annotated[
        str | None, typer.Option(help="csv, tsv, json, jsonl or parquet; a directory; a hub id")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="held-out data; by default a validation split or a part")
    ] = None,
    revision: Revision = None,
    config: Annotated[
        Path | None, typer.Option(help="a YAML file with these settings; options override it")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="begin anew in a directory with an unfinished run")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Search a mask for a model on a data set, and write it to a directory.

    The same command on an unfinished directory goes on where it stopped.
    """
    settings = {**_from_file(config), **settings}
    given = {"model": model, "data": data, "eval_data": eval_data, "revision": revision}
    settings |= {k: v for k, v in given.items() if v is not None}
    if missing := [k for k in ("model", "data") if not settings.get(k)]:
        raise UsageError(
            f"--{k} is missing: {'what to search' if k == 'model' else 'on what'}." for k in missing
        )
    split_settings({k: v for k, v in settings.items() if k not in given})  # before torch comes
    api = import_module("ird_search.api")
    model, data = settings.pop("model"), settings.pop("data")
    result = api.search_mask(model, data, output=output, progress=True, fresh=fresh, **settings)
    _show(result, output, as_json)


@app.command(epilog=EXIT_CODES, short_help="Go on with an interrupted run.")
@resumable
def resume(
    output: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="of an unfinished run")],
    workers: Annotated[
        int | None, typer.Option(help="processes; by default as many as before", min=1, max=256)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Go on with an interrupted run where it stopped, with its own settings.

    To begin anew instead, give `run` its options again, and --fresh.

    A finished run is checked: its mask, and its study, which is made again if it is damaged.
    """
    found = import_module("ird_search.status").Status.of(output)
    if found.state == "finished":
        told = import_module("ird_search.finished").checked(output)
        print(json.dumps({**found.to_dict(), "told": told}, indent=1) if as_json else told)
        return
    if not found.command:
        raise UsageError(_not_by_name(found))
    settings = {k: v for k, v in found.settings.items() if v is not None}
    settings |= {} if workers is None else {"workers": workers}
    api = import_module("ird_search.api")
    model, data = settings.pop("model"), settings.pop("data")
    _show(api.search_mask(model, data, output=output, progress=True, **settings), output, as_json)


def _not_by_name(found: Any) -> str:
    if found.state == "running":
        return f"{found.directory} is being written by process {found.process}. Wait for it."
    return (
        f"The run in {found.directory} works on {found.settings['model']} and "
        f"{found.settings['data']}, objects of a Python program, which no command can make again. "
        "Call search_mask with the same arguments and output; for the demo: ird-search demo "
        f"--output {shlex.quote(found.directory)} --seed {found.settings.get('seed')}."
    )


@app.command(short_help="Where a run stands.")
@guarded
def status(
    output: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="of a run")],
    as_json: JsonFlag = False,
) -> None:
    """Where a run stands: finished units, rounds, failures, and how to go on."""
    found = import_module("ird_search.status").Status.of(output)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.describe())


@app.command(short_help="A real search that needs no network.")
@functools.partial(guarded, goes_on=_demo_goes_on)
def demo(
    output: Output = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="every random choice derives from it")] = 0,
    workers: Annotated[int, typer.Option(help="processes", min=1, max=256)] = 1,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="begin anew in a directory with an unfinished run")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Pretrain a small vision transformer on some digits, and search a mask for the others.

    Needs no network; needs scikit-learn: pip install 'ird_search[demo]'.
    """
    module = import_module("ird_search.demo")
    _show(module.run(output, seed=seed, workers=workers, fresh=fresh), output, as_json)


@app.command(short_help="The samples of a finished run, as positions in its data.")
@guarded
def rows(
    output: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="of a finished run")],
    which: Annotated[
        Literal["chosen", "outliers", "suspects"],
        typer.Option(
            help="chosen for the mask; with far larger scores than the others; with labels that "
            "the trained model contradicts"
        ),
    ] = "chosen",
    as_json: JsonFlag = False,
) -> None:
    """Print which rows of the data a finished run chose, or found odd: one position a line.

    Positions count from 0. With --json, all that is known of every row of the pool.
    """
    require_finished(output, needed="samples.jsonl")
    found = import_module("ird_search.sample_report").read_report(output)
    if as_json:
        print(json.dumps([asdict(row) for row in found.rows], indent=1))
    else:
        print(*getattr(found, which), sep="\n", end="\n" if getattr(found, which) else "")


@app.command(name="inspect")
@guarded
def inspect_(
    file: Annotated[
        Path, typer.Argument(help="a mask or delta file, or the directory that holds a mask")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Verify a mask or delta file and tell what it holds."""
    require_finished(file)
    found = import_module("ird_search.artifact").inspect_file(file)
    print(json.dumps(found.metadata, indent=1, sort_keys=True) if as_json else found.describe())


@app.command(short_help="Is a file whole, and of these weights?")
@guarded
def verify(
    file: Annotated[
        Path, typer.Argument(help="a mask or delta file, or the directory that holds a mask")
    ],
    model: Base = None,
    revision: Revision = None,
) -> None:
    """Check that a file is whole, and with --model that it is of these very weights.

    Exit code 0 if so, 5 if not.
    """
    require_finished(file)
    exchange = import_module("ird_search.exchange")
    print(exchange.verify(file, model=model, revision=revision))


@app.command(short_help="What two masks share.")
@guarded
def compare(
    a: Annotated[Path, typer.Argument(help="a mask file, or the directory that holds it")],
    b: Annotated[Path, typer.Argument(help="another one")],
    tensors: Annotated[int, typer.Option(help="tensors to list", min=0)] = 10,
    as_json: JsonFlag = False,
) -> None:
    """What two masks share, beside what two random masks of their sizes would.

    No model is needed.
    """
    require_finished(a, b)
    found = import_module("ird_search.exchange").compare(a, b)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.describe(shown=tensors))


@app.command()
@guarded
def merge(
    files: Annotated[list[Path], typer.Argument(help="mask files; or one delta, with --model")],
    output: Written,
    how: Annotated[
        Literal["union", "intersection", "difference", "disjoint"] | None,
        typer.Option(
            help="union (default); difference: the first without the others; disjoint: a mask for "
            "each, which share nothing"
        ),
    ] = None,
    model: Base = None,
    revision: Revision = None,
) -> None:
    """Combine masks into one, or put a delta into its base model.

    Masks need no model and give a file, disjoint ones a directory. A delta and its base give a
    directory that transformers loads.
    """
    require_finished(*files)
    exchange = import_module("ird_search.exchange")
    if model is None:
        written, note = exchange.combine_masks(files, output, how=how or "union")
        for path, mask in written.items():
            print(f"{path}  {mask.count:,} parameters")
        print(note, end="\n" * bool(note))
        return
    if len(files) != 1 or how:
        raise UsageError(
            f"{len(files)} files came with --model{f' and --how {how}' * bool(how)}; it takes one "
            "delta, and no --how."
        )
    found = exchange.merged_model(files[0], output, model=model, revision=revision)
    print(f"{found.delta!r}\n{output}")


@app.command(short_help="Write a mask in another library's form.")
@guarded
def export(
    mask: Annotated[Path, typer.Argument(help="a mask file, or the directory that holds it")],
    to: Annotated[
        Literal["supertuning", "shira", "lora", "fish", "bool", "delta"],
        typer.Option(help="PEFT adapters, LoRA's ranks, FISH's mask.bin, bool tensors, or a delta"),
    ],
    output: Written,
    model: Base = None,
    revision: Revision = None,
    tuned: Annotated[
        Path | None, typer.Option(help="delta: the directory of the tuned model")
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(help="supertuning: at most so many; by default no entry is repeated", min=1),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="shira: r", min=1)] = None,
    budget: Annotated[int | None, typer.Option(help="lora: its parameters", min=1)] = None,
) -> None:
    """Write a mask in another library's form, and tell what became of every entry.

    supertuning, shira and lora write a directory, the others a file. What is trained whole beside
    the mask (the head) is what the mask file records.
    """
    require_finished(mask)
    exchange = import_module("ird_search.exchange")
    options = exchange.Options(tuned=tuned, adapters=adapters, rank=rank, budget=budget)
    told = exchange.export_mask(
        mask, output, to=to, model=model, revision=revision, options=options
    )
    print(f"{told}\n{output}")


@app.command(name="import")
@guarded
def import_(
    file: Annotated[Path, typer.Argument(help="the file of another format")],
    kind: Annotated[
        Literal["fish", "bool", "delta"],
        typer.Option("--from", help="FISH's mask.bin, bool tensors (safetensors), or a delta"),
    ],
    output: Written,
    dense: Annotated[
        list[str] | None,
        typer.Option(help="name or regular expression of what is trained whole (repeatable)"),
    ] = None,
) -> None:
    """Write the mask of another format as an ird-mask file."""
    exchange = import_module("ird_search.exchange")
    mask, whole = exchange.import_mask(file, output, kind=kind, dense=dense or ())
    print(f"{mask!r}\ndense: {', '.join(whole) or 'none'}\n{output}")
    if not whole and kind != "delta":
        print(
            "The file does not say what is trained whole beside the mask (the head). Name it with "
            "--dense where the file has its tensors; where not, as dense=… when you train."
        )
    full = [n for n, i in mask.indices.items() if i.numel() == math.prod(mask.space.shape(n))]
    if full and not whole:
        print(f"{len(full)} tensors are selected whole, as {full[0]}; name a head with --dense.")


@app.command()
@guarded
def env(as_json: JsonFlag = False) -> None:
    """Versions and devices, to paste into an issue."""
    found = import_module("ird_search.environment").environment()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name.ljust(width)}  {value}" for name, value in found.items()))


def _from_file(path: Path | None) -> dict[str, Any]:
    """The settings of a config file, without those that are left open."""
    if path is None:
        return {}
    found = import_module("ird_search.rundir").read_config(path)
    return {k: v for k, v in found.items() if v is not None}  # an empty list does mean something


def _show(result: Any, output: Path, as_json: bool) -> None:
    """The table, or one JSON document."""
    mask = output / "mask.safetensors"
    if not as_json:
        print(
            f"\nBest pair: {len(result.samples.ids)} samples, density {result.mask.density:.3%} "
            f"({result.mask.count:,} parameters)\n\n{result.table()}\n\nMask: {mask}"
        )
        return
    document = {
        "mask": str(mask),
        "samples": result.samples.ids.tolist(),
        "density": result.mask.density,
        "parameters": result.mask.count,
        "score": result.score if result.score == result.score else None,
        **{k: result.provenance[k] for k in ("learning_rate", "verdict", "sentence", "fisher")},
    }
    print(json.dumps(document, indent=1))


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that spin for long while they wait made a fine-tune eight times slower beside
    # one other busy process; a short spin costs a tenth. Read when torch is imported, later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if not out_of_memory(error):
            raise
        print("ird-search: out of memory.", file=sys.stderr)
        raise SystemExit(ResourceError.exit_code) from None


if __name__ == "__main__":
    main()
