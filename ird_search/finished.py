"""What is checked of a run that is finished."""

from __future__ import annotations

import shlex
from pathlib import Path

from ird_search.artifact import load_mask
from ird_search.errors import ArtifactError
from ird_search.ledger import Ledger
from ird_search.rundir import RunDirectory
from ird_search.study import restored


def checked(path: str | Path) -> str:
    """Check the files of a finished run; a study that is damaged is made again from the ledger.

    Raises:
        ArtifactError: the mask is damaged.
    """
    place = RunDirectory(Path(path))
    try:
        mask = load_mask(place.mask)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error} The ledger can make it again: remove {place.mask.name}, then "
            f"ird-search resume {shlex.quote(str(path))}."
        ) from error
    text = f"{path} is finished: {place.mask} is whole, {mask.count:,} parameters."
    with place.held():
        if place.ledger.is_dir() and restored(place.study, Ledger(place.ledger)):
            text += f" {place.study.name} was damaged and is made again from the ledger."
    return text
