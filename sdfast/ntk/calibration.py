"""Seconds on this machine: two real micro-batches, one tile of products, and what they say of a whole Gram matrix."""

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sdfast.ntk.blocks import Block, Group, collect
from sdfast.ntk.costs import Rates, units_at_once
from sdfast.ntk.plan import Entry, Plan, Seconds
from sdfast.ntk.products import TERMS, products_in, tile_of_factors, tile_of_rows
from sdfast.ntk.result import tiles_of
from sdfast.ntk.source import Source
from sdfast.ntk.streamed import Streamed, streamed_tiles
from sdfast.ntk.verified import findings_of

# Where FLOPs nearly tie and nothing was measured: by kind of device.
# The CPU's: two cores of an AMD EPYC, float32, by `measure_rates`, the best of three.
RECORDED = {"cpu": Rates(products=6.3e10, gradients=9.8e10, pairs=2.9e7)}

_GROUPS = 3  # of which micro-batches and tiles are timed; the others lie between
_POSITIONS = 2048  # rows of the factors of a contraction that is timed


def measure_rates(dtype: torch.dtype, device: torch.device, precision: str) -> Rates:
    """Times one product, one batch of gradients and one contraction, of usual sizes.

    Args:
        dtype: Of the gradients.
        device: Of the model.
        precision: Of the products.

    Returns:
        The rates.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    n, positions, width = 256, 8, 64
    rows, layer_in, layer_out = draw(1, n, TERMS), draw(32, 64, 256), draw(32, 64, 256)
    a, b = draw(n, positions, width), draw(1, n, positions, width)
    with products_in(precision):
        products = 2.0 * n * n * TERMS / best(lambda: tile_of_rows(rows, rows, "one", precision), device)
        gradients = 2.0 * layer_in.numel() * 256 / best(lambda: torch.bmm(layer_in.mT, layer_out), device)
        pairs = float(n * positions) ** 2
        seconds = best(lambda: tile_of_factors((a, b), (a, b), "one", precision), device)
    return Rates(products, gradients, pairs / max(seconds - 4 * pairs * width / products, 0.1 * seconds))


def predict(plan: Plan, left: Source, right: Source) -> Seconds:
    """The seconds of the whole matrix.

    Args:
        plan: With its groups.
        left: Of the rows.
        right: Of the columns.

    Returns:
        What each part is predicted to take.
    """
    device = next(iter(left.parameters.values())).device
    start = time.perf_counter()
    findings_of(left.model, left.inputs, left.outputs, left.parameters)  # as the next matrix will
    synchronise(device)
    probing = time.perf_counter() - start
    step = max(1, (len(plan.groups) - 1 + _GROUPS - 2) // (_GROUPS - 1))
    chosen = plan.groups[::step] if len(plan.groups) > _GROUPS else plan.groups
    if not chosen:
        return Seconds(probing, 0.0, 0.0)
    passes = [
        sum(_seconds_of_pass(source, group, number == 0, device) for source in dict.fromkeys((left, right)))
        for number, group in enumerate(chosen)
    ]
    tiles = [_seconds_of_tiles(plan, group, left, device) for group in chosen]
    scale = len(plan.groups) / len(chosen)
    return Seconds(probing, scale * sum(passes), scale * sum(tiles))


def _seconds_of_pass(source: Source, group: Group, fresh: bool, device: torch.device) -> float:
    """Of all samples: the median of two micro-batches, of a source seen for the first time of three but the first.

    Memory fresh from the system is not to be taken for the speed of the passes, nor what else ran for a moment.
    """
    few = copy.copy(source)
    few.samples = min(source.samples, 2 * source.batch_size)
    runs = (2 if fresh else 1) * (2 if few.samples <= source.batch_size else 1)
    timed = [seconds for _ in range(runs) for seconds in _seconds_of_micro_batches(few, group, device)]
    return statistics.median(timed[fresh:]) * source.samples


def _seconds_of_micro_batches(source: Source, group: Group, device: torch.device) -> Iterator[float]:
    """Of one sample, by each micro-batch in turn."""
    started, before = time.perf_counter(), 0
    for number, step in enumerate(collect(source, group), 1):
        if isinstance(step, Block):
            return
        if number % source.classes:
            continue
        synchronise(device)
        now = time.perf_counter()
        yield (now - started) / (step - before)
        started, before = now, step
        if step == source.samples:
            return  # what a pass must have seen by its end, two micro-batches need not show


def _seconds_of_tiles(plan: Plan, group: Group, source: Source, device: torch.device) -> float:
    """Of all tiles: one on the diagonal and one off it are timed, where there are both."""
    kinds: dict[tuple[int, int, bool], int] = {}
    for rows, columns in tiles_of(*plan.samples, plan.symmetric, plan.form):
        kind = (rows.stop - rows.start, columns.stop - columns.start, plan.symmetric and rows == columns)
        kinds[kind] = kinds.get(kind, 0) + 1
    like = next(iter(source.parameters.values())).detach()
    entries = [entry for entry in plan.entries if entry.name in group.factored]
    # The largest tile of each kind; ragged ones take their share of it.
    total = 0.0
    for diagonal in (True, False):
        sizes = {size: count for size, count in kinds.items() if size[2] == diagonal}
        if sizes:
            largest = max(sizes, key=lambda size: size[0] * size[1])
            area = largest[0] * largest[1]
            seconds = _seconds_of_tile(plan, group.width, entries, largest, like, device)
            total += seconds * sum(count * size[0] * size[1] / area for size, count in sizes.items())
    return total + _seconds_of_stream(plan, [entry for entry in plan.entries if entry.name in group.streamed], like)


def _seconds_of_stream(plan: Plan, entries: Sequence[Entry], like: Tensor) -> float:
    """Of all tiles and the gradients that are formed for them, from the first columns of each kind of layer."""
    tiles = list(tiles_of(*plan.samples, plan.symmetric, plan.form))
    measured: dict[tuple[tuple[int, ...], tuple[int, int, int]], float] = {}
    total = 0.0
    for entry in entries:
        if entry.factors is None:
            continue
        kind = (entry.shape, entry.factors)
        if kind not in measured:
            left = _drawn_stream(entry, plan, plan.samples[0], like)
            right = left if plan.symmetric else _drawn_stream(entry, plan, plan.samples[1], like)
            units = min(left.units, units_at_once(left.unit, plan.everyone * plan.classes, plan.itemsize))
            share = left.units / units
            left.units = right.units = units
            step = functools.partial(streamed_tiles, [(left, right)], like, tiles, plan.form, plan.precision)
            with products_in(plan.precision):
                measured[kind] = share * best(step, like.device)
        total += measured[kind]
    return total


def _drawn_stream(entry: Entry, plan: Plan, samples: int, like: Tensor) -> Streamed:
    """Factors of all samples, in micro-batches."""
    positions, inputs, width = entry.factors or (0, 0, 0)
    drawn = Streamed(entry.shape, (positions, inputs, width), samples, plan.classes)
    for start in range(0, samples, plan.batch_size):
        few = min(plan.batch_size, samples - start)
        a = _drawn_inputs(entry, few, like)
        for output in range(plan.classes):
            drawn.add(start, output, a, like.new_empty(few, positions, width).normal_())
    return drawn


def _drawn_inputs(entry: Entry, samples: int, like: Tensor) -> Tensor:
    """A, of an embedding tokens."""
    positions, inputs, _ = entry.factors or (0, 0, 0)
    if inputs:
        return like.new_empty(samples, positions, inputs).normal_()
    return torch.randint(entry.shape[0], (samples, positions), device=like.device)


def _seconds_of_tile(
    plan: Plan, width: int, entries: Sequence[Entry], size: tuple[int, int, bool], like: Tensor, device: torch.device
) -> float:
    rows, columns, diagonal = size
    seconds = 0.0
    with products_in(plan.precision):
        if width:
            # Of a wide panel the second of two widths, so that what a tile costs once counts once.
            widths = [width] if width <= 2 * TERMS else [TERMS, 2 * TERMS]
            sides = like.new_empty(plan.classes, rows + columns, widths[-1]).normal_()
            left, right = sides.split([rows, columns], 1)
            timed = []
            for taken in widths:
                one = Block(left[..., :taken], {})
                other = one if diagonal else Block(right[..., :taken], {})
                timed.append(best(functools.partial(_tile, plan, one, other, (rows, columns)), device))
            seconds += timed[-1] + (max(timed[-1] - timed[0], 0.0) * (width / TERMS - 2) if len(timed) > 1 else 0.0)
        measured: dict[tuple[tuple[int, int, int], int], float] = {}
        for entry in entries:
            if entry.factors is None:
                continue
            key = (entry.factors, entry.shape[0])
            if key not in measured:
                measured[key] = _seconds_of_factors(plan, entry, rows, columns, diagonal, like, device)
            seconds += measured[key]
    return seconds


def _tile(plan: Plan, left: Block, right: Block, size: tuple[int, int]) -> None:
    """A tile as `gram` computes it: looked through for what is not finite, and added to H."""
    rows, columns = slice(0, size[0]), slice(0, size[1])
    tile = left.tile(right, rows, columns, plan.form, plan.precision)
    tile.isfinite().all()
    place = tile.float()
    place.copy_(place + tile)


def _seconds_of_factors(
    plan: Plan, entry: Entry, rows: int, columns: int, diagonal: bool, like: Tensor, device: torch.device
) -> float:
    """Of one contracted parameter on one tile, from as many of its rows as take a moment."""
    positions, _, width = entry.factors or (0, 0, 0)
    few = max(1, _POSITIONS // positions)
    sizes = (min(rows, few), min(columns, few))

    def draw(samples: int) -> tuple[Tensor, Tensor]:
        return _drawn_inputs(entry, samples, like), like.new_empty(plan.classes, samples, positions, width).normal_()

    def block(samples: int) -> Block:
        return Block(like.new_empty(plan.classes, samples, 0), {entry.name: draw(samples)})

    one = block(sizes[0])
    other = one if diagonal else block(sizes[1])
    seconds = best(functools.partial(_tile, plan, one, other, sizes), device)
    return seconds * (rows * columns) / (sizes[0] * sizes[1])


def best(step: Callable[[], object], device: torch.device) -> float:
    """The least seconds of a few runs, after one that is not counted."""
    step()
    synchronise(device)
    least = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        step()
        synchronise(device)
        least = min(least, time.perf_counter() - start)
    return least


def synchronise(device: torch.device) -> None:
    """Waits for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
