"""What a run shows while it works: a bar and single lines, on standard error."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Progress:
    """Tells a person what is going on; silent unless asked.

    Args:
        show: whether to show anything.
    """

    def __init__(self, show: bool = False) -> None:
        self.show = show
        self._bar: tqdm | None = None

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self.show:
            tqdm.write(text + "\n", file=sys.stderr, end="")  # at once, or a signal parts them

    def start(self, what: str) -> None:
        """A bar that counts fine-tunes."""
        self.stop()
        if self.show:
            self._bar = tqdm(
                desc=what,
                unit="fine-tune",
                file=sys.stderr,
                leave=False,
                disable=None,
            )

    def step(self) -> None:
        """One fine-tune is done."""
        if self._bar is not None:
            self._bar.update(1)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
