"""A bar whose remaining time rests on what passes over the samples and tiles have taken so far."""

import time

from tqdm import tqdm


class Progress:
    """Seconds done and seconds to come, over groups of parameters.

    A group takes one pass over the samples, the same for every group, and products that grow with its width.

    Args:
        widths: Columns of every group.
        shown: Whether there is a bar at all.
    """

    def __init__(self, widths: list[int], shown: bool) -> None:
        self.widths = widths
        self.group = 0
        self._pass = self._column = 0.0  # seconds of a pass, and of the products of one column
        self._started = self._phase = time.monotonic()
        layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} passed, {postfix}"
        self._bar = tqdm(total=1.0, desc="Gram matrix", bar_format=layout, disable=not shown)

    def passed(self, share: float) -> None:
        """A share of the pass over the samples is done."""
        spent = time.monotonic() - self._phase
        self._pass = spent / share
        self._show(self._pass - spent + self._column * self.widths[self.group])
        if share >= 1:
            self._phase = time.monotonic()

    def multiplied(self, share: float) -> None:
        """A share of the tiles of the group is done."""
        spent = time.monotonic() - self._phase
        self._column = spent / share / max(self.widths[self.group], 1)
        self._show(spent / share - spent)
        if share >= 1:
            self._phase = time.monotonic()
            self.group += 1

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def remaining(self, of_this_group: float) -> float:
        """Seconds to come, given those of the group at work."""
        later = self.widths[self.group + 1 :]
        return of_this_group + sum(self._pass + self._column * width for width in later)

    def _show(self, of_this_group: float) -> None:
        remaining = self.remaining(of_this_group)
        elapsed = time.monotonic() - self._started
        self._bar.set_postfix_str(f"{tqdm.format_interval(remaining)} to come", refresh=False)
        self._bar.n = elapsed / max(elapsed + remaining, 1e-9)
        self._bar.refresh()
