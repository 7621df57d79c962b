"""Layers with several positions a sample: A and B are held, and gradients formed from them some columns at a time.

The columns of all samples are multiplied while they are in the cache, and overwritten by the next ones. So memory fresh
from the system, which costs more than the gradients that are written to it, is taken for the factors alone: less of it,
and often one pass over the samples where whole gradients would take several.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sdfast.ntk.costs import units_at_once
from sdfast.ntk.products import tile_of_rows
from sdfast.ntk.sample_rows import PathChangedError


class Streamed:
    """A and B of one parameter, as the micro-batches gave them.

    Args:
        shape: Of the parameter.
        factors: (T, d, p) as the probe found them, d = 0 where A holds tokens.
        samples: Of the source.
        classes: Outputs.
    """

    def __init__(self, shape: tuple[int, ...], factors: tuple[int, int, int], samples: int, classes: int) -> None:
        self.positions, inputs, self.units = factors
        self.unit = inputs or shape[0]
        self.samples, self.classes, self.delivered = samples, classes, 0
        self._pieces: list[tuple[int, int, Tensor, Tensor]] = []
        self._versions: list[tuple[int, int]] = []

    def add(self, start: int, output: int, a: Tensor, b: Tensor) -> None:
        """Takes the factors of a micro-batch, which are not copied.

        Args:
            start: Its first sample.
            output: Which.
            a: A (samples, T, d) or tokens (samples, T), negative for none.
            b: B (samples, T, p).
        """
        before = self._pieces[-1] if self._pieces else None
        if before is not None and before[0] == start:
            a = before[2]  # the same for all outputs
        elif a.is_floating_point():
            a = _by_rows(a)
        b = _by_rows(b)
        self._pieces.append((start, output, a, b))
        self._versions.append((a._version, b._version))
        self.delivered += len(b)

    def check_unchanged(self, name: str) -> None:
        """Refuses factors that a later micro-batch wrote over, as a module may that keeps its input in a buffer.

        Raises:
            PathChangedError: There are such.
        """
        if self._versions != [(a._version, b._version) for _, _, a, b in self._pieces]:
            raise PathChangedError(f"an argument of the call with {name} is overwritten by a later one")

    def factors(self) -> Iterator[Tensor]:
        """All A and B."""
        for _, _, a, b in self._pieces:
            yield from (a, b)

    def columns(self, memory: Tensor, first: int, last: int) -> Tensor:
        """The gradients of the units from `first` to `last`, in this memory.

        Returns:
            (classes, samples, columns).
        """
        units = last - first
        shape = (self.classes, self.samples, units * self.unit)
        panel = memory[: shape[0] * shape[1] * shape[2]].view(shape)
        if self.delivered < self.classes * self.samples or not self._pieces[0][2].is_floating_point():
            panel.zero_()
        for start, output, a, b in self._pieces:
            part, values = panel[output, start : start + len(b)], b[:, :, first:last]
            if a.is_floating_point():
                torch.bmm(values.mT, a, out=part.view(len(b), units, self.unit))
            else:
                rows = (a.clamp_min(0) + self.unit * torch.arange(len(a), device=a.device)[:, None]).flatten()
                values = torch.where(a[..., None] >= 0, values, 0)
                part.view(-1, units).index_add_(0, rows, values.reshape(-1, units))
        return panel


def _by_rows(factor: Tensor) -> Tensor:
    """The same numbers as a product takes them, which would copy others again for all its columns."""
    return factor if factor.stride(-1) == 1 and factor.stride(-2) >= factor.shape[-1] else factor.contiguous()


def streamed_tiles(
    sides: list[tuple[Streamed, Streamed]],
    like: Tensor,
    tiles: list[tuple[slice, slice]],
    form: str,
    precision: str,
) -> list[Tensor] | None:
    """What streamed parameters give to all tiles of a Gram matrix.

    Args:
        sides: Of each parameter, those of the rows and of the columns; the same one twice for a symmetric matrix.
        like: A gradient: of their dtype and device.
        tiles: Rows and columns of each.
        form: See `products.tile_of_rows`.
        precision: Of `PRECISIONS`.

    Returns:
        Each tile in float64; ``None`` where there are no such parameters.
    """
    at_once, entries = [], 0
    for left, right in sides:
        held = left.classes * (left.samples + (0 if right is left else right.samples))
        at_once.append(min(left.units, units_at_once(left.unit, held, like.element_size())))
        entries = max(entries, held * at_once[-1] * left.unit)
    memory = like.new_empty(entries)
    totals: list[Tensor] = []
    for (left, right), units in zip(sides, at_once, strict=True):
        for first in range(0, left.units, units):
            last = min(first + units, left.units)
            one = left.columns(memory, first, last)
            other = one if right is left else right.columns(memory[one.numel() :], first, last)
            added = [
                tile_of_rows(one[:, rows], other[:, columns], form, precision, right is left and rows == columns)
                for rows, columns in tiles
            ]
            totals = [before.add_(tile) for before, tile in zip(totals, added, strict=True)] if totals else added
    return totals or None
