"""What the commands share: options, settings as options, and one message for what goes wrong."""

from __future__ import annotations

import functools
import inspect
import shlex
import signal
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ird_search.config import SearchConfig
from ird_search.errors import IRDError, ResourceError, UsageError, out_of_memory
from ird_search.settings import plain_type

EXIT_CODES = """\b
Exit codes: 0 ok, 2 usage, 3 data, 4 model, 5 mask or delta file, 6 no proxy succeeded,
75 out of memory or disk, 130/143 interrupted; after these the command that is printed goes on."""

JsonFlag = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Base = Annotated[str | None, typer.Option("--model", help="the base model: a directory or hub id")]
Revision = Annotated[str | None, typer.Option(help="revision of a hub model")]
Written = Annotated[
    Path, typer.Option("--output", "-o", help="file or directory to write; must not be there")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="run directory; made if missing")]


SECTIONS = {
    "task": "The data",
    "density": "The mask",
    "balanced": "The samples",
    "rounds": "Rounds and fine-tunes",
    "score": "Scores and the verdict",
    "head": "The candidate parameters",
    "fisher": "The Fisher pass",
    "workers": "The machine",
}
"""Sections of the help by the setting that each begins with; the settings behind it follow."""


class Sectioned(TyperCommand):
    """A command whose help lists its options in sections, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if (told := option.get_help_record(ctx)) is not None:
                section = getattr(option, "rich_help_panel", None) or "Options"
                sections.setdefault(section, []).append(told)
        for section, lines in sections.items():
            with formatter.section(section):
                formatter.write_dl(lines)


class _Terminated(BaseException):
    """SIGTERM, raised where the program is, so that everything is left in order."""


def _terminate(signum: int, frame: Any) -> None:
    raise _Terminated


def guarded(
    command: Callable[..., None], goes_on: Callable[..., str] = lambda **_: ""
) -> Callable[..., None]:
    """Turn what goes wrong in a command into one message and the right exit code.

    Args:
        goes_on: from the command's arguments, what to say where it stopped half-way.
    """

    @functools.wraps(command)
    def run(**kwargs: Any) -> None:
        before = signal.signal(signal.SIGTERM, _terminate)
        told = functools.partial(goes_on, began=time.time(), **kwargs)
        try:
            command(**kwargs)
        except ResourceError as error:
            _end(f"ird-search: {error} {told()}", error.exit_code)
        except IRDError as error:
            _end(f"ird-search: {error}", error.exit_code)
        except KeyboardInterrupt:
            _end(f"Interrupted. {told()}", 128 + signal.SIGINT)
        except _Terminated:
            _end(f"Terminated. {told()}", 128 + signal.SIGTERM)
        except Exception as error:
            if not out_of_memory(error):
                raise
            smaller = "Lower --batch-size, --fisher-tokens or --cache-mb." * bool(told())
            text = f"ird-search: out of memory. {smaller} {told()}"
            _end(text, ResourceError.exit_code)
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


def _resume(output: Path, fresh: bool = False, *, began: float = 0.0, **_: Any) -> str:
    """What takes up the run in this directory; of a fresh one, if it has begun."""
    config = output / "config.yaml"
    if not config.exists() or (fresh and config.stat().st_mtime < began):
        return "Nothing was written yet: start it again."
    return f"Go on with: ird-search resume {shlex.quote(str(output))}"


resumable = functools.partial(guarded, goes_on=_resume)
"""For commands whose finished work stays in their `output`."""


def _end(message: str, code: int) -> typing.NoReturn:
    print(message.rstrip(), file=sys.stderr)
    raise typer.Exit(code)


def require_finished(*places: Path, needed: str = "mask.safetensors") -> None:
    """Refuse the directory of an unfinished run, before a file that it lacks is missed.

    Raises:
        UsageError: the run has not ended: where it stands, and how to go on.
    """
    for place in places:
        try:
            begun = all((place / name).is_file() for name in ("config.yaml", "run.json"))
            if not begun or any((place / n).exists() for n in (needed, "delta.safetensors")):
                continue
        except OSError:  # told by who opens it
            continue
        raise UsageError(_where_it_stands(import_module("ird_search.status").Status.of(place)))


def _where_it_stands(found: Any) -> str:
    state = (
        f"being written by process {found.process}" if found.state == "running" else "unfinished"
    )
    done = f"{sum(found.units.values())} finished units, {len(found.rounds)} rounds"
    ends = "Run the program that began it again, with the same arguments and output."
    if found.command:
        ends = f"Go on with: {found.command}"
    elif found.state == "running":
        ends = "Wait for it."
    return f"The run in {found.directory} is {state}: {done}, and no mask. {ends}"


def with_settings(*configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of these settings, help and range included.

    An option that is not given stays out of `settings`, so that a config file can fill it in.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name != "settings"]
        names = [f.name for c in configs for f in fields(c)]
        section, made = "", []
        for config, f in [(c, f) for c in configs for f in fields(c)]:
            section = SECTIONS.get(f.name, section)
            made.append(_parameter(config, f, section))
        emptied = [f.name for c in configs for f in fields(c) if _can_be_emptied(c, f)]

        def run(**given: Any) -> None:
            settings = {n: v for n in names if (v := given.pop(n)) not in (None, [])}
            settings = {n: [] if v == ["none"] and n in emptied else v for n, v in settings.items()}
            command(**given, settings=settings)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*kept, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *made)}
        return run

    return decorate


def _can_be_emptied(config: type, f: Any) -> bool:
    """Whether it is a list of a search that by default is not empty."""
    hint, _ = plain_type(typing.get_type_hints(config)[f.name])
    return config is SearchConfig and typing.get_origin(hint) is tuple and f.default != ()


def _parameter(config: type, f: Any, section: str) -> inspect.Parameter:
    """One option: `None` when not given, its default told in the help, under a section of it."""
    hint, _ = plain_type(typing.get_type_hints(config)[f.name])
    many = typing.get_origin(hint) is tuple
    flag = f"--{f.name.replace('_', '-').removesuffix('-columns')}"
    flag += "-column" if f.name == "text_columns" else ""
    names = [f"{flag}/--no{flag[1:]}"] if hint is bool else [flag]
    shown = ", ".join(f.default) if isinstance(f.default, tuple) else f.default
    default = "" if shown in (None, False, "") else f" [default: {shown}]"
    emptied = _can_be_emptied(config, f)
    repeat = " (repeatable; none for an empty list)" if emptied else " (repeatable)"
    option = typer.Option(
        *names,
        help=f.metadata["help"] + default + (repeat if many else ""),
        show_default=False,
        rich_help_panel=section or None,
    )
    kind = list[str] if many else hint
    return inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
