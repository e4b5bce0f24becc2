"""Which few parameters should I train, and which samples tell me?

Square the gradient of each sample's log-likelihood, entry by entry, and you have one matrix:

    F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²          samples × parameters

A *mask* is a choice of columns, a *sample set* a choice of rows. `search_mask` narrows both in turn
(iterative range decreasing), scores candidates by short masked fine-tunes, and returns the best
mask, with a verdict against random masks at their own best learning rate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ird_search.api import FisherScores, SearchResult, fisher_scores, search_mask
    from ird_search.artifact import (
        Delta,
        inspect_delta,
        inspect_mask,
        load_delta,
        load_mask,
        save_delta,
        save_mask,
    )
    from ird_search.config import SearchConfig
    from ird_search.delta import export_delta
    from ird_search.freeze import apply_mask
    from ird_search.mask import SparseMask
    from ird_search.merge import merge_delta
    from ird_search.optimizer import MaskedAdamW, masked
    from ird_search.paired import Gain
    from ird_search.parameters import ParameterSpace
    from ird_search.reading import Reading
    from ird_search.sample_report import SampleReport, read_report
    from ird_search.stability import Stability
    from ird_search.training import finetune
    from ird_search.verdict import Verdict

__version__ = "0.1.0"

_HOMES = {
    "Delta": "artifact",
    "FisherScores": "api",
    "Gain": "paired",
    "MaskedAdamW": "optimizer",
    "ParameterSpace": "parameters",
    "Reading": "reading",
    "SampleReport": "sample_report",
    "SearchConfig": "config",
    "SearchResult": "api",
    "SparseMask": "mask",
    "Stability": "stability",
    "Verdict": "verdict",
    "apply_mask": "freeze",
    "export_delta": "delta",
    "finetune": "training",
    "fisher_scores": "api",
    "inspect_delta": "artifact",
    "inspect_mask": "artifact",
    "load_delta": "artifact",
    "load_mask": "artifact",
    "masked": "optimizer",
    "merge_delta": "merge",
    "read_report": "sample_report",
    "save_delta": "artifact",
    "save_mask": "artifact",
    "search_mask": "api",
}

__all__ = [
    "Delta",
    "FisherScores",
    "Gain",
    "MaskedAdamW",
    "ParameterSpace",
    "Reading",
    "SampleReport",
    "SearchConfig",
    "SearchResult",
    "SparseMask",
    "Stability",
    "Verdict",
    "apply_mask",
    "export_delta",
    "finetune",
    "fisher_scores",
    "inspect_delta",
    "inspect_mask",
    "load_delta",
    "load_mask",
    "masked",
    "merge_delta",
    "read_report",
    "save_delta",
    "save_mask",
    "search_mask",
]


def __dir__() -> list[str]:
    """What there is, also before it is imported."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import on first use: `ird-search --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ird_search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ird_search.{_HOMES[name]}"), name)
