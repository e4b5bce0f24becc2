"""From files to files: what `ird-search verify`, `compare`, `merge`, `export` and `import` do.

Masks and deltas are read and verified, the base model is loaded as the search loaded it, and what
comes out is written whole or not at all.
"""

from ird_search.exchange.combine import How, combine_masks, merged_model
from ird_search.exchange.compare import Comparison, compare
from ird_search.exchange.export import Options, Origin, Target, export_mask, import_mask
from ird_search.exchange.verify import verify

__all__ = [
    "Comparison",
    "How",
    "Options",
    "Origin",
    "Target",
    "combine_masks",
    "compare",
    "export_mask",
    "import_mask",
    "merged_model",
    "verify",
]
