"""`compare`: two mask files side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ird_search.artifact.contents import clip
from ird_search.exchange.base import MaskOf, mask_of, part
from ird_search.overlap import Overlap


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two masks side by side.

    Args:
        overlap: what they share, by tensor.
        same_base: whether both were made for the same weights; None where one does not say.
        differences: what both record and record differently, as (what, in A, in B).
    """

    a: MaskOf
    b: MaskOf
    overlap: Overlap
    same_base: bool | None
    differences: tuple[tuple[str, Any, Any], ...]

    def describe(self, *, shown: int = 10) -> str:
        """A few lines and a table, for people."""
        base = {True: "the same", False: "different", None: "not recorded in both"}[self.same_base]
        lines = [
            f"{label}  {f.mask.count:,} of {f.mask.space.numel:,} parameters "
            f"({f.mask.density:.4%})  {f.path}"
            for label, f in (("A", self.a), ("B", self.b))
        ]
        lines += [f"base weights: {base}"]
        lines += [
            f"{clip(what, 40)}: {clip(a)} in A, {clip(b)} in B".replace('"', "")
            for what, a, b in self.differences
        ]
        return "\n".join([*lines, "", self.overlap.describe(shown=shown)])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        total = self.overlap.total
        return {
            **{
                label: {
                    "path": str(f.path),
                    "sha256": f.sha256,
                    "count": f.mask.count,
                    "density": f.mask.density,
                }
                for label, f in (("a", self.a), ("b", self.b))
            },
            "same_base": self.same_base,
            "shared": total.shared,
            "only_a": total.only_a,
            "only_b": total.only_b,
            "jaccard": total.jaccard,
            "jaccard_by_chance": total.by_chance,
            "jaccard_by_chance_within_tensors": self.overlap.by_chance_within,
            "differences": {what: [a, b] for what, a, b in self.differences},
            "tensors": {
                name: {
                    "entries": c.entries,
                    "shared": c.shared,
                    "only_a": c.only_a,
                    "only_b": c.only_b,
                    "jaccard": c.jaccard,
                }
                for name, c in self.overlap.tensors.items()
                if c.a or c.b
            },
        }


def compare(a: Path, b: Path) -> Comparison:
    """What the masks of two files share; no model is needed.

    Raises:
        ArtifactError: a file is damaged, or is neither a mask nor a delta.
        UsageError: the masks are of different models.
    """
    one, other = mask_of(a), mask_of(b)
    hashes = [f.provenance.get("weights_sha256") for f in (one, other)]
    same = hashes[0] == hashes[1] if None not in hashes else None
    mine, its = _told(one.provenance), _told(other.provenance)
    differences = tuple(
        (key, mine[key], its[key]) for key in mine if key in its and mine[key] != its[key]
    )
    return Comparison(one, other, one.mask.overlap(other.mask), same, differences)


def _told(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about task, data and settings, by name."""
    task, data = part(provenance, "task"), part(provenance, "dataset")
    found = [data.get("origin"), str(data.get("fingerprint", ""))[:12]]
    named = {"task": task.get("name"), "data": " ".join(str(f) for f in found if f)}
    return {key: value for key, value in named.items() if value} | dict(part(provenance, "search"))
