"""What is checked of a run that is finished."""

from __future__ import annotations

from pathlib import Path

from ird_search.artifact import load_mask
from ird_search.errors import ArtifactError
from ird_search.ledger import Ledger
from ird_search.rundir import RunDirectory, read_config, resume_command
from ird_search.study import is_whole, restore


def checked(path: str | Path) -> str:
    """Check the files of a finished run; a study that is damaged is made again from the ledger.

    Raises:
        ArtifactError: the mask is damaged.
    """
    place = RunDirectory(Path(path))
    try:
        mask = load_mask(place.mask)
    except ArtifactError as error:
        command = resume_command(path, read_config(place.config))
        again = command or "run the program again, with the same arguments and output"
        raise ArtifactError(
            f"{error} Or make it again from what the ledger holds: remove {place.mask}, then "
            f"{again}."
        ) from error
    text = f"{path} is finished: {place.mask} is whole, {mask.count:,} parameters."
    if place.ledger.is_dir() and not is_whole(place.study, ledger := Ledger(place.ledger)):
        with place.held():
            restore(place.study, ledger)
        text += f" {place.study.name} was missing or damaged, and is made again from the ledger."
    if lacking := [p.name for p in (place.rounds, place.report) if not p.is_file()]:
        text += f" Missing: {', '.join(lacking)}."
    return text
