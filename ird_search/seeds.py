"""One seed for each random choice, derived from the run's seed.

No random state is ever stored: whoever needs numbers derives a seed from (run seed, what for), so
a run that was interrupted, or whose parts ran in another order, draws the same numbers.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in 0 … 2⁶³ − 1 for one purpose.

    Example:
        >>> derive(0, "batches", 1) == derive(0, "batches", 1) != derive(0, "batches", 2)
        True
    """
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
