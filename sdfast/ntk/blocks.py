"""Parameters in groups whose gradients fit in memory, and the gradients of all samples for one group at a time."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sdfast.ntk.plan import Plan
from sdfast.ntk.products import add_single_positions, single_positions, tile_of_factors, tile_of_rows
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source
from sdfast.ntk.streamed import Streamed, streamed_tiles


class Piece(NamedTuple):
    """Columns `start` to `stop` of a parameter's gradient, flattened."""

    parameter: str
    start: int
    stop: int


class Group(NamedTuple):
    """What one pass over the samples collects: pieces of gradients, factors of contracted and streamed parameters.

    Attributes:
        pieces: Of parameters whose gradients are materialised.
        factored: Contracted parameters.
        streamed: Streamed ones.
        biases: Contracted biases, each with the weight whose factors serve it.
    """

    pieces: tuple[Piece, ...]
    factored: tuple[str, ...]
    streamed: tuple[str, ...] = ()
    biases: tuple[tuple[str, str], ...] = ()

    @property
    def width(self) -> int:
        """Columns of all pieces."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def groups_of(plan: Plan, samples: int, classes: int, itemsize: int, memory: int) -> list[Group]:
    """Parameters in order, packed into groups.

    Args:
        plan: Method and sizes of each parameter.
        samples: Of both sides together.
        classes: Outputs.
        itemsize: Bytes of a number.
        memory: Bytes that the gradients of a group may take.

    Returns:
        The groups. A gradient that is too wide is cut into pieces.

    Raises:
        MemoryError: Not even one column fits.
    """
    column = samples * classes * itemsize
    if column > memory:
        raise MemoryError(
            f"memory: got {memory} bytes, but one column of the gradients of {samples} samples and {classes} outputs "
            f"takes {column}"
        )
    groups: list[Group] = []
    pieces: list[Piece] = []
    factored: list[str] = []
    streamed: list[str] = []
    biases = [(entry.name, entry.beside) for entry in plan.entries if entry.beside]
    left = memory

    def close() -> None:
        nonlocal left
        if pieces or factored or streamed:
            beside = tuple(pair for pair in biases if pair[1] in factored)
            groups.append(Group(tuple(pieces), tuple(factored), tuple(streamed), beside))
        for held in (pieces, factored, streamed):
            held.clear()
        left = memory

    for entry in plan.entries:
        if entry.method == "zero" or entry.beside:
            continue
        if entry.method in ("contract", "stream"):
            size = entry.factor_bytes(samples, classes, itemsize)
            if size > left:
                close()
            (factored if entry.method == "contract" else streamed).append(entry.name)
            left = max(0, left - size)
            continue
        start = 0
        while start < entry.numel:
            width = min(entry.numel - start, left // column)
            if width == 0 or (width < entry.numel - start and entry.numel * column <= memory):
                close()
                continue
            pieces.append(Piece(entry.name, start, start + width))
            left -= width * column
            start += width
    close()
    return groups


class Block:
    """Gradients of all samples of a source for one group.

    Attributes:
        rows: (outputs, samples, width).
        factors: By contracted parameter A (samples, T, d) or tokens (samples, T), and B (outputs, samples, T, p).
        streamed: By streamed parameter.
        biased: The contracted parameters whose factors serve a bias too.
    """

    def __init__(
        self,
        rows: Tensor,
        factors: dict[str, tuple[Tensor, Tensor]],
        streamed: dict[str, Streamed] | None = None,
        biased: frozenset[str] = frozenset(),
    ) -> None:
        self.rows, self.factors, self.streamed, self.biased = rows, factors, streamed or {}, biased

    def tile(self, other: "Block", rows: slice, columns: slice, form: str, precision: str) -> Tensor:
        """What rows and contracted factors add to a tile of H, in float64; see `products.tile_of_rows`."""
        triangle = other is self and rows == columns
        total = tile_of_rows(self.rows[:, rows], other.rows[:, columns], form, precision, triangle)
        for name, (a, b) in self.factors.items():
            other_a, other_b = other.factors[name]
            left, right = (a[rows], b[:, rows]), (other_a[columns], other_b[:, columns])
            if single_positions(left, right, form):
                add_single_positions(total, left, right, precision, triangle, name in self.biased)
            else:
                total += tile_of_factors(left, right, form, precision, name in self.biased)
        return total

    def streamed_tiles(
        self, other: "Block", tiles: list[tuple[slice, slice]], form: str, precision: str
    ) -> list[Tensor] | None:
        """What streamed parameters add to each of all tiles; ``None`` where there are none."""
        sides = [(streamed, other.streamed[name]) for name, streamed in self.streamed.items()]
        return streamed_tiles(sides, self.rows, tiles, form, precision)

    def not_finite(self, group: Group) -> list[str]:
        """The parameters of the group whose gradients hold NaN or infinity."""
        names = [name for name, (a, b) in self.factors.items() if not (_finite(a) and _finite(b))]
        names += [bias for bias, weight in group.biases if not _finite(self.factors[weight][1])]
        names += [name for name, streamed in self.streamed.items() if not all(map(_finite, streamed.factors()))]
        offset = 0
        for name, start, stop in group.pieces:
            if not _finite(self.rows[..., offset : offset + stop - start]):
                names.append(name)
            offset += stop - start
        return list(dict.fromkeys(names))


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def collect(source: Source, group: Group) -> Iterator[Block | int]:
    """One pass over the samples of a source.

    Args:
        source: Where the gradients come from.
        group: Which.

    Yields:
        The number of samples done after each micro-batch and output, at last the block.

    Raises:
        PathChangedError: A layer has another number of positions than on the probe.
    """
    first = next(iter(source.parameters.values()))
    rows = source.panel(group.width)
    factors = {name: _empty_factors(source, name, first) for name in group.factored}
    streamed = {name: _empty_stream(source, name) for name in group.streamed}
    wanted = list(dict.fromkeys(piece.parameter for piece in group.pieces))
    places = list(itertools.accumulate((piece.stop - piece.start for piece in group.pieces), initial=0))
    panels = {
        piece: rows[:, :, first:last]
        for piece, (first, last) in zip(group.pieces, itertools.pairwise(places), strict=True)
    }
    whole = {
        name: panel for (name, start, stop), panel in panels.items() if stop - start == source.parameters[name].numel()
    }
    delivered: set[str] = set()
    for chunk in source.chunks(wanted, [*group.factored, *group.streamed], whole):
        part = slice(chunk.start, chunk.stop)
        for (name, start, stop), panel in panels.items():
            if name not in whole:
                panel[chunk.output, part] = chunk.rows[name][:, start:stop]
        delivered = delivered if chunk.output else set()
        for name, (a, b) in chunk.factors.items():
            if a.shape[1] != source.findings.factors[name][0]:
                raise PathChangedError(f"{name} came with {a.shape[1]} positions")
            if name in streamed:
                streamed[name].add(chunk.start, chunk.output, a, b)
                continue
            if source.batch_size == source.samples and source.classes == 1:  # all there is: held as it came
                factors[name] = a, b[None]
                continue
            if name not in delivered:  # of the micro-batch, by an earlier output: A is the same for all
                factors[name][0][part] = a
            factors[name][1][chunk.output, part] = b
        delivered = delivered | chunk.factors.keys()
        yield chunk.stop
    for name, one in streamed.items():
        one.check_unchanged(name)
    yield Block(rows, factors, streamed, frozenset(weight for _, weight in group.biases))


def _empty_stream(source: Source, name: str) -> Streamed:
    return Streamed(tuple(source.parameters[name].shape), source.findings.factors[name], source.samples, source.classes)


def _empty_factors(source: Source, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros: an output that does not depend on the parameter delivers none."""
    positions, inputs, width = source.findings.factors[name]
    if inputs:
        a = like.new_zeros(source.samples, positions, inputs)
    else:
        a = like.new_full((source.samples, positions), -1, dtype=torch.int64)
    return a, like.new_zeros(source.classes, source.samples, positions, width)
