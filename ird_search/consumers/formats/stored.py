"""Masks in files of other tools: FISH's `mask.bin`, and bools as safetensors.

Files are read without running code that they may hold.
"""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ird_search.consumers.formats.tensors import from_tensors, problems_with, to_tensors
from ird_search.errors import ArtifactError, UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask
from ird_search.parameters import require_module

_POLARITY = "trains"
"""The key under which a safetensors file of bools says which value means "train"."""

_HEAD = "head"
"""The key under which it lists what is trained whole beside the mask, as a JSON list of names."""

_OWN = {"ird_mask": "load_mask", "ird_delta": "load_delta"}
"""What reads the safetensors files of this package, by a key of their metadata."""

_DATA_PARALLEL = "module."

_MAX_TENSORS = 100_000


def read_fish_mask(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, dense: Iterable[str] = ()
) -> tuple[SparseMask, tuple[str, ...]]:
    """The mask in a `mask.bin` of FISH: a dict of float tensors, 1 = train, laid out as the model.

    FISH trains its head whole, by ones in its tensors. Name it in `dense`; FISH means every name
    with "classifier" in it. The prefix of `DataParallel` is taken off where the model lacks it.

    Args:
        model: as in `from_tensors`.
        dense: regular expressions for the tensors that are trained whole.

    Raises:
        ArtifactError: the file is missing, damaged, or holds anything but a dict of tensors. Code
            in it is not run.
        UsageError: as for `from_tensors`.

    Example:
        >>> import tempfile
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> mask = SparseMask(ParameterSpace.of(model, ["0.weight"]), torch.tensor([3]))
        >>> path = Path(tempfile.mkdtemp()) / "mask.bin"
        >>> write_fish_mask(mask, path, model, dense=["1.weight", "1.bias"])
        >>> again, dense = read_fish_mask(path, model, dense=["^1"])
        >>> again.indices, dense
        ({'0.weight': tensor([3])}, ('1.weight', '1.bias'))
    """
    tensors = _unwrapped(read_tensors(path), model)
    with _about(path):
        return from_tensors(tensors, model, trains=1, dense=dense)


def write_fish_mask(
    mask: SparseMask,
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    dense: Iterable[str] = (),
) -> None:
    """Write a mask as FISH's `mask.bin`, which its `--mask_path` reads: 4 bytes a parameter.

    Args:
        model: FISH wants a tensor for every named parameter, in the mask or not.
        dense: names of the parameters trained whole, outside the mask (the head).

    Raises:
        ModelError: the mask is of another model.
        UsageError: an unknown dense name, a tensor that is dense and masked, or a place that cannot
            be written.
        ResourceError: the disk is full; a former file is untouched.
    """
    tensors = to_tensors(mask, model, trains=1, dense=dense)
    buffer = io.BytesIO()
    torch.save({name: t.float() for name, t in tensors.items()}, buffer)
    write_atomically(path, buffer.getvalue())


def read_bool_mask(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, dense: Iterable[str] = ()
) -> tuple[SparseMask, tuple[str, ...]]:
    """The mask in a safetensors file of bools that says which value means "train".

    Args:
        model: as in `from_tensors`.
        dense: regular expressions for the tensors that are trained whole.

    Returns:
        The mask, and the names of the dense parameters: those that the file notes, too, which it
        need not hold.

    Raises:
        ArtifactError: the file is missing, damaged, or does not tell its polarity.
        UsageError: as for `from_tensors`.
    """
    tensors, notes = _read(Path(path))
    note = notes.get(_POLARITY)
    if note not in ("0", "1"):
        raise ArtifactError(
            f"{path} does not say which value means train: its metadata has {_POLARITY}={note!r}, "
            "and '0' or '1' is accepted. If you know it, use from_tensors(read_tensors(path), …, "
            "trains=…)."
        )
    with _about(path):
        mask, whole = from_tensors(tensors, model, trains=1 if note == "1" else 0, dense=dense)
    known = None if model is None else {name for name, _ in model.named_parameters()}
    noted = (n for n in _noted_head(notes) if n not in tensors and (known is None or n in known))
    return mask, tuple(dict.fromkeys((*whole, *noted)))


def _noted_head(notes: Mapping[str, str]) -> tuple[str, ...]:
    """What a file says is trained whole; nothing where that is no list of names."""
    try:
        found = json.loads(notes.get(_HEAD, "[]"))
    except (ValueError, RecursionError):
        return ()
    names = found if isinstance(found, list) else []
    return tuple(name for name in names if isinstance(name, str) and name.isprintable())


def write_bool_mask(
    mask: SparseMask, path: str | os.PathLike[str], *, head: Sequence[str] = ()
) -> None:
    """Write a bool tensor for every tensor of the mask's space, as safetensors; True = train.

    It takes a byte a parameter, and anyone can read it. Equal masks give equal bytes.

    Args:
        head: names of what is trained whole beside the mask: noted in the file's metadata.

    Raises:
        UsageError: the place cannot be written.
        ResourceError: the disk is full; a former file is untouched.

    Example:
        >>> import tempfile
        >>> from ird_search.parameters import ParameterSpace
        >>> path = Path(tempfile.mkdtemp()) / "bools.safetensors"
        >>> space = ParameterSpace(("w",), ((2, 2),))
        >>> write_bool_mask(SparseMask(space, torch.tensor([1])), path)
        >>> safetensors.torch.load_file(path)
        {'w': tensor([[False,  True],
                      [False, False]])}
    """
    flat = torch.zeros(mask.space.numel).bool()
    flat[mask.coords] = True
    tensors = {name: t.clone() for name, t in mask.space.split(flat).items()}
    notes = {_POLARITY: "1", **({_HEAD: json.dumps(list(head))} if head else {})}
    write_atomically(path, safetensors.torch.save(tensors, metadata=notes))


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file of `torch.save` or safetensors, whichever it is, for `from_tensors`.

    Raises:
        ArtifactError: the file is missing, damaged, or holds anything but a dict of tensors. Code
            in it is not run.
    """
    return _read(Path(path))[0]


def _unwrapped(tensors: dict[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """The tensors under the names that the model has without `DataParallel` around it."""
    wrapped = all(name.startswith(_DATA_PARALLEL) for name in tensors)
    if model is not None:
        require_module(model)
    if model is None or not wrapped or any(n in tensors for n, _ in model.named_parameters()):
        return tensors
    return {name.removeprefix(_DATA_PARALLEL): t for name, t in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors of a file, and the notes that safetensors keeps beside them."""
    try:
        if not path.is_file():  # also keeps a pipe or a device from being opened
            raise ArtifactError(f"{path}: there is no such file. Pass a file of tensors.")
        with open(path, "rb") as stream:
            start, size = stream.read(9), os.fstat(stream.fileno()).st_size
        # safetensors: eight bytes of length, then JSON. torch.save: a zip archive, or a pickle.
        is_json = start[8:] == b"{" and not start.startswith(b"PK")
        found, notes = _read_safetensors(path) if is_json else (_read_pickle(path), {})
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error
    except ArtifactError:
        raise
    except Exception as error:  # a damaged pickle can end in any exception
        raise ArtifactError(
            f"{path} is damaged, or holds more than tensors ({type(error).__name__}). A dict of "
            "tensors is accepted, by torch.save or safetensors; whatever else the file holds was "
            "not run."
        ) from error
    if own := [reader for key, reader in _OWN.items() if key in notes]:
        raise ArtifactError(f"{path} is a file of this package: read it with {own[0]}.")
    if problems := problems_with(found):
        raise ArtifactError(f"{path}: {problem}" for problem in problems)
    if (entries := sum(t.numel() for t in found.values())) > 8 * size:
        raise ArtifactError(
            f"{path} declares {entries:,} entries in {size:,} bytes, by tensors that repeat stored "
            "ones. Save them whole: name.contiguous()."
        )
    return found, notes


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    with safe_open(path, "pt") as file:
        if len(names := sorted(file.keys())) > _MAX_TENSORS:
            raise ArtifactError(
                f"{path} lists {len(names):,} tensors; at most {_MAX_TENSORS:,} are accepted."
            )
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _read_pickle(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # as torch.save writes since 1.6; the former cannot be mapped
    if mapped:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ArtifactError(
                    f"{path} is a compressed archive, which torch.save does not write, and which "
                    "may hold far more than it seems to. Save the tensors again with torch.save."
                )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a damaged file torch says what is for its developers
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


@contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let the errors of the block say which file they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{os.fspath(path)}: {problem}" for problem in error.problems) from error
