"""Masks in other formats: dicts of zeros and ones, FISH's `mask.bin`, `torch.nn.utils.prune`.

Formats disagree on two things, which are therefore always said and never guessed:

* polarity: whether 1 means "train" (FISH) or "frozen" (GPS); in `torch.nn.utils.prune` it means
  "keep the weight";
* layout: `nn.Linear` stores its weight as (out, in), the `Conv1D` of transformers as (in, out).
"""

from ird_search.consumers.formats.pruning import from_prune, to_prune
from ird_search.consumers.formats.stored import (
    read_bool_mask,
    read_fish_mask,
    read_tensors,
    write_bool_mask,
    write_fish_mask,
)
from ird_search.consumers.formats.tensors import from_tensors, to_tensors

__all__ = [
    "from_prune",
    "from_tensors",
    "read_bool_mask",
    "read_fish_mask",
    "read_tensors",
    "to_prune",
    "to_tensors",
    "write_bool_mask",
    "write_fish_mask",
]
