"""Masks as PEFT adapters: exact in SuperTuning, projected in SHiRA, as ranks in LoRA.

A mask chooses columns of the samples × parameters matrix, whatever tensor they lie in; PEFT adapts
layers. `to_supertuning` and `to_shira` wrap a model, `rank_pattern` gives the arguments of a
`LoraConfig`. Each also returns a `Coverage` that accounts for every selected entry.

`layers` tells what of a mask can be adapted, and how PEFT is told so; then one file a method.
"""

from ird_search.consumers.peft.coverage import Coverage, TensorCoverage
from ird_search.consumers.peft.lora import rank_pattern
from ird_search.consumers.peft.shira import to_shira
from ird_search.consumers.peft.supertuning import load_supertuning, to_supertuning

__all__ = [
    "Coverage",
    "TensorCoverage",
    "load_supertuning",
    "rank_pattern",
    "to_shira",
    "to_supertuning",
]
