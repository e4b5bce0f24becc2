"""`SampleSet`: the user's data, normalised once at the door.

The rows of the samples × parameters matrix F[i, j]. Behind this door everything sees one type:
unbatched tensors by input name, one label a row, and stable ids, on the CPU
(`ird_search.data.encoding.encode` makes it from a `Source`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ird_search.errors import DataError
from ird_search.task import IGNORED

PATCH = 768
"""Numbers that count as one token where an input has no tokens: a patch of 16 × 16 × 3 pixels."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples as the model takes them.

    Args:
        inputs: by name, batch first.
        labels: [B], or [B, T] for a language model.
        rows: positions in the `SampleSet`, int64: [B].
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: Tensor

    def to(self, device: torch.device | str | None) -> Batch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(moved, self.labels.to(device), self.rows.to(device))

    def part(self, rows: slice) -> Batch:
        """Some of its rows, as views."""
        some = {name: value[rows] for name, value in self.inputs.items()}
        return Batch(some, self.labels[rows], self.rows[rows])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class SampleSet:
    """N samples in a fixed order, unpadded.

    Args:
        inputs: unbatched tensors by input name, one mapping a sample.
        labels: [N] int64 (classes) or float32 (regression); one 1-D int64 tensor a sample for a
            language model, as long as its tokens.
        ids: the sample's position in the user's data, int64: [N]. Kept by `select`.
        pad: what fills a shorter 1-D input in a batch, by name; 0 where not named.
        pad_side: where the filling goes. On the right, absolute positions stay what they are
            without padding, so a sample's likelihood does not depend on its batch.
        label_names: class names in the order of their ids.

    Example:
        >>> samples = SampleSet(
        ...     inputs=({"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}),
        ...     labels=torch.tensor([0, 1]),
        ...     ids=torch.arange(2),
        ... )
        >>> samples
        SampleSet(2 samples, 2 classes, inputs: input_ids, 1-3 tokens)
        >>> samples.batch([1, 0]).inputs["input_ids"]
        tensor([[8, 0, 0],
                [5, 6, 7]])
    """

    inputs: tuple[Mapping[str, Tensor], ...]
    labels: tuple[Tensor, ...] | Tensor
    ids: Tensor
    pad: Mapping[str, int | float] = field(default_factory=dict)
    pad_side: Literal["right", "left"] = "right"
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise DataError(
                f"{len(self.inputs)} inputs, {len(self.labels)} labels and {len(self.ids)} ids "
                "came; a sample set needs one of each for every sample."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each sample, int64: [N].

        The length of `input_ids` or of the first other 1-D integer input; without one, the size of
        the largest input in patches of 768 numbers, at least 1. Of what an encoder and a decoder
        read, the longer one.
        """
        return torch.tensor([_length(sample) for sample in self.inputs], dtype=torch.int64)

    @cached_property
    def kin(self) -> Tensor:
        """Samples of equal number may share a batch, int64: [N].

        All may, where a model can tell padding from a sample: by an attention mask, or because it
        is causal and reads what is filled in on the right after all that counts. Where it cannot, a
        sample's numbers would depend on its batch, so samples share one with their equals only.
        """
        inputs = self.inputs[0] if len(self) else {}
        causal = not isinstance(self.labels, Tensor) and "decoder_input_ids" not in inputs
        if causal or any(name.endswith("attention_mask") for name in inputs):
            return torch.zeros(len(self), dtype=torch.int64)
        numbers: dict[tuple[int, ...], int] = {}
        found = [numbers.setdefault(_padded_lengths(s), len(numbers)) for s in self.inputs]
        return torch.tensor(found, dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, inputs and labels: equal for equal samples in equal order."""
        digest = hashlib.sha256()
        for i, sample in enumerate(self.inputs):
            digest.update(f"sample {int(self.ids[i])}\n".encode())
            for name in sorted(sample):
                _digest(digest, name, sample[name])
            _digest(digest, "label", self.labels[i])
        return digest.hexdigest()

    def contents(self) -> tuple[bytes, ...]:
        """SHA-256 of each sample's inputs and label, whatever its id: equal for equal samples."""
        found = []
        for sample, label in zip(self.inputs, self.labels, strict=True):
            digest = hashlib.sha256()
            for name in sorted(sample):
                _digest(digest, name, sample[name])
            _digest(digest, "label", label)
            found.append(digest.digest())
        return tuple(found)

    def select(self, rows: Iterable[int] | Tensor) -> SampleSet:
        """The samples at some positions, in the order given."""
        index = _index(rows)
        wanted = index.tolist()
        labels = self.labels
        return SampleSet(
            inputs=tuple(self.inputs[i] for i in wanted),
            labels=labels[index]
            if isinstance(labels, Tensor)
            else tuple(labels[i] for i in wanted),
            ids=self.ids[index],
            pad=self.pad,
            pad_side=self.pad_side,
            label_names=self.label_names,
        )

    def batch(
        self, rows: Iterable[int] | Tensor, device: torch.device | str | None = None
    ) -> Batch:
        """One padded batch of the samples at some positions, in the order given."""
        index = _index(rows)
        wanted = index.tolist()
        inputs = {
            name: _stack(
                [self.inputs[i][name] for i in wanted], self.pad.get(name, 0), self.pad_side
            )
            for name in self.inputs[wanted[0]]
        }
        if isinstance(self.labels, Tensor):
            labels = self.labels[index]
        else:
            labels = _stack([self.labels[i] for i in wanted], IGNORED, self.pad_side)
        batch = Batch(inputs, labels, index)
        return batch if device is None else batch.to(device)

    def batches(
        self,
        rows: Iterable[int] | Tensor | None = None,
        *,
        size: int,
        device: torch.device | str | None = None,
    ) -> Iterator[Batch]:
        """Batches of `size` samples in the order given (all samples by default)."""
        index = torch.arange(len(self)) if rows is None else _index(rows)
        for part in torch.split(index, size):
            yield self.batch(part, device)

    def length_batches(
        self,
        rows: Iterable[int] | Tensor | None = None,
        *,
        tokens: int,
        device: torch.device | str | None = None,
    ) -> Iterator[Batch]:
        """Batches of samples of like length, of at most `tokens` tokens with padding.

        Rows are sorted by length, ties in the order given; a sample longer than `tokens` comes
        alone. Where padding would change a sample's numbers (`kin`), nothing is padded.
        """
        for part in self.length_split(rows, tokens=tokens):
            yield self.batch(part, device)

    def length_split(
        self, rows: Iterable[int] | Tensor | None = None, *, tokens: int
    ) -> list[Tensor]:
        """The rows of each of the `length_batches`."""
        index = torch.arange(len(self)) if rows is None else _index(rows)
        index = index[self.kin[index].argsort(stable=True)]
        index = index[self.lengths[index].argsort(stable=True)]
        lengths, kin = self.lengths[index].tolist(), self.kin[index].tolist()
        parts, start = [], 0
        for stop in range(1, len(index) + 1):
            full = stop == len(index) or (stop + 1 - start) * lengths[stop] > tokens
            if full or kin[stop] != kin[start]:
                parts.append(index[start:stop])
                start = stop
        return parts

    def __repr__(self) -> str:
        if not len(self):
            return "SampleSet(0 samples)"
        if not isinstance(self.labels, Tensor):
            what = "token labels"
        elif self.labels.is_floating_point():
            what = "number labels"
        else:
            what = f"{len(set(self.labels.tolist()))} classes"
        low, high = int(self.lengths.min()), int(self.lengths.max())
        spread = f"{low}-{high}" if low < high else f"{low}"
        return (
            f"SampleSet({len(self):,} samples, {what}, inputs: {', '.join(self.inputs[0])}, "
            f"{spread} token{'s' if high > 1 else ''})"
        )


EXCLUDED_SHARE = 0.01
"""More samples than this without finite numbers end a run."""


def require_few(
    ids: Sequence[int],
    total: int,
    what: str = "samples",
    *,
    share: float = EXCLUDED_SHARE,
) -> None:
    """At most this share of the samples may have to be left out.

    Raises:
        DataError: with the first rows.
    """
    if len(ids) > share * total:
        listed = ", ".join(map(str, ids[:10])) + " …" * (len(ids) > 10)
        raise DataError(
            f"{len(ids)} of {total} {what} have a log-likelihood or a gradient that is not finite, "
            f"more than {share:.0%}. Rows (counting from 0): {listed}."
        )


def _index(rows: Iterable[int] | Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.to("cpu", torch.int64)
    return torch.tensor([int(i) for i in rows], dtype=torch.int64)


def _length(sample: Mapping[str, Tensor]) -> int:
    if "decoder_input_ids" in sample:
        encoder = {n: t for n, t in sample.items() if not n.startswith("decoder_")}
        return max(len(sample["decoder_input_ids"]), _length(encoder))
    order = sorted(sample, key=lambda name: name != "input_ids")
    for name in order:
        if sample[name].ndim == 1 and not sample[name].is_floating_point():
            return len(sample[name])
    return max([1, *(math.ceil(value.numel() / PATCH) for value in sample.values())])


def _padded_lengths(sample: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of all that a batch fills up, but for what a causal decoder reads."""
    names = sorted(name for name, t in sample.items() if t.ndim == 1)
    return tuple(len(sample[name]) for name in names if not name.startswith("decoder_"))


def _stack(tensors: Sequence[Tensor], pad: int | float, side: str) -> Tensor:
    longest = max(t.shape[0] if t.ndim == 1 else 0 for t in tensors)
    if all(t.shape == tensors[0].shape for t in tensors):
        return torch.stack(list(tensors))
    out = tensors[0].new_full((len(tensors), longest), pad)
    for row, t in zip(out, tensors, strict=True):
        row[: len(t)] = t
        if side == "left":
            row.copy_(row.roll(longest - len(t)))
    return out


def _digest(digest: Any, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
    digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
