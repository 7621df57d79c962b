"""What the methods cost: operations, bytes, passes, memory; and the choice between two methods of one parameter."""

from typing import TYPE_CHECKING, NamedTuple

from sdfast.ops.gram.precision import TERMS

if TYPE_CHECKING:
    from sdfast.ntk.plan import Entry, Plan

_NEAR = 2.0  # where operations differ by no more than this factor, they alone choose wrongly: measured rates decide
_PANEL = 2**24  # bytes of the streamed gradients that are formed at once: they stay in the cache


class Rates(NamedTuple):
    """How fast a machine is at each kind of work.

    Attributes:
        products: FLOPs a second of products of gradients.
        gradients: FLOPs a second of gradients per sample.
        pairs: Pairs of positions a second that a contraction forms, multiplies and sums up, beside its products.
    """

    products: float
    gradients: float
    pairs: float


class Work(NamedTuple):
    """Of one parameter, over all samples and outputs: FLOPs of gradients, of products; pairs of positions."""

    gradients: float
    products: float
    pairs: float = 0.0

    @property
    def flops(self) -> float:
        """All of them; a pair is multiplied and added."""
        return self.gradients + self.products + 2 * self.pairs

    def seconds(self, rates: Rates) -> float:
        """At these rates."""
        return self.gradients / rates.gradients + self.products / rates.products + self.pairs / rates.pairs


def materialised(
    gradient_flops: float, numel: int, samples: tuple[int, int], symmetric: bool, form: str, classes: int
) -> Work:
    """Gradients of all samples, then their products.

    Args:
        gradient_flops: Of the gradient of one sample and output.
        numel: Entries of the parameter.
        samples: n of both sides; the same ones where `symmetric`.
        symmetric: Whether the lower triangle is all that is needed.
        form: See `products.tile_of_rows`.
        classes: Outputs.

    Returns:
        The work.
    """
    blocks = classes**2 if form == "full" else classes
    everyone = samples[0] if symmetric else sum(samples)
    sides = 1 if symmetric else 2
    return Work(float(gradient_flops) * everyone * classes, float(sides * samples[0] * samples[1] * numel * blocks))


def contracted(
    factors: tuple[int, int, int], samples: tuple[int, int], symmetric: bool, form: str, classes: int
) -> Work:
    """(AAᵀ)∘(BBᵀ) over all pairs of positions; AAᵀ is shared by the outputs. Arguments as of `materialised`."""
    positions, inputs, width = factors
    blocks = classes**2 if form == "full" else classes
    pairs = samples[0] * samples[1] * positions**2 * (0.5 if symmetric else 1)
    return Work(0.0, 2 * pairs * (inputs + width * blocks), pairs * blocks)


def contracts(
    factors: tuple[int, int, int],
    numel: int,
    samples: tuple[int, int],
    form: str,
    classes: int,
    rates: Rates | None = None,
) -> bool:
    """Whether (AAᵀ)∘(BBᵀ) is cheaper than gradients and their products.

    Counted for one output and the lower triangle of n samples: T²(d + p + 1) < dp(1 + 2T/n). With C outputs the product
    AAᵀ is shared: T²(d/C + p + 1) < dp(1 + 2T/n) for the trace and per class, T²(d/C² + p + 1) < dp(1 + 2T/nC) for all
    blocks. Where both counts are within a factor of two, the rates decide if they are given.

    Args:
        factors: (T, d, p); d = 0 where A holds tokens, whose products are comparisons.
        numel: dp; of an embedding all rows, used or not.
        samples: n of both sides.
        form: See `products.tile_of_rows`.
        classes: C.
        rates: Of the machine.

    Returns:
        Whether to contract.
    """
    # Both sides counted whole: halving all of it for a triangle compares the same.
    rows = materialised(2.0 * factors[0] * numel, numel, samples, False, form, classes)
    pairs = contracted(factors, samples, False, form, classes)
    if rates is not None and pairs.flops < _NEAR * rows.flops and rows.flops < _NEAR * pairs.flops:
        return pairs.seconds(rates) < rows.seconds(rates)
    return pairs.flops < rows.flops


def may_serve(factors: tuple[int, int, int], numel: int, form: str, classes: int) -> bool:
    """Whether the factors of a layer can be of use: fewer numbers than its gradients, or cheaper for some n.

    Contraction compares best at n = 1, where each gradient is formed for a single product.

    Args:
        factors: See `contracts`.
        numel: See `contracts`.
        form: See `contracts`.
        classes: See `contracts`.

    Returns:
        Whether; where not, nothing asks for them.
    """
    positions, inputs, width = factors
    rows = materialised(2.0 * positions * numel, numel, (1, 1), False, form, classes)
    pairs = contracted(factors, (1, 1), False, form, classes)
    return positions * (max(inputs, 1) + classes * width) < numel * classes or pairs.flops < _NEAR * rows.flops


def units_at_once(unit: int, held: int, itemsize: int) -> int:
    """Rows of a weight (columns of an embedding) whose gradients are formed together.

    Args:
        unit: Entries of one.
        held: Gradients of one entry: samples of all sides, times outputs.
        itemsize: Bytes of a number.

    Returns:
        At least 1, and no fewer columns than a sum of products takes in one go.
    """
    return max(1, max(TERMS, _PANEL // (held * itemsize)) // unit)


def streams(
    factors: tuple[int, int, int], shape: tuple[int, ...], everyone: int, classes: int, itemsize: int, memory: int
) -> bool:
    """Whether factors are held in place of gradients that are multiplied as rows: they must be fewer numbers.

    Args:
        factors: See `contracts`.
        shape: Of the parameter.
        everyone: Samples of both sides together.
        classes: C.
        itemsize: Bytes of a number.
        memory: Bytes of a group, beside which the columns that are formed at once must be few.

    Returns:
        Whether.
    """
    positions, inputs, width = factors
    unit = inputs or shape[0]
    fewer = positions * (max(inputs, 1) + classes * width) < unit * width * classes
    columns = min(width, units_at_once(unit, everyone * classes, itemsize)) * unit
    return fewer and columns * everyone * classes * itemsize <= memory // 8


def count(plan: "Plan", work_of: dict[str, int], forward_flops: int, tiles: list[tuple[int, int, bool]]) -> None:
    """Fills in the costs of every entry and of the passes.

    Args:
        plan: To fill.
        work_of: FLOPs of one sample's gradient by parameter, as the probe counted them.
        forward_flops: Of the model on one sample.
        tiles: Rows, columns of every tile, and whether it lies on the diagonal.
    """
    everyone = plan.everyone
    looped = any(entry.method == "loop" for entry in plan.entries)
    for entry in plan.entries:
        entry.passes = sum(
            entry.name in (*group.factored, *group.streamed, *dict(group.biases))
            or any(piece.parameter == entry.name for piece in group.pieces)
            for group in plan.groups
        )
        if entry.method != "zero":
            _count_entry(entry, plan, work_of.get(entry.name, 0), tiles)
    # A backward pass through the activations takes as many products as the forward did; a looped parameter takes one
    # through the whole micro-batch for each sample in it.
    backward = plan.classes * (1 + (2 * plan.batch_size if looped else 0))
    plan.pass_flops = forward_flops * everyone * (1 + backward) * len(plan.groups)
    result = 8 if plan.precision == "float64" else 4
    blocks = plan.blocks if plan.form in ("full", "per_class") else 1
    area = sum(rows * columns for rows, columns, _ in tiles) * blocks
    plan.result_bytes = plan.samples[0] * plan.samples[1] * blocks * result
    plan.tile_bytes = 2 * area * result * len(plan.groups)


def _count_entry(entry: "Entry", plan: "Plan", flops: int, tiles: list[tuple[int, int, bool]]) -> None:
    if entry.beside:  # each product of its weight's inputs plus 1
        entry.product_flops = int(contracted((1, 0, 0), plan.samples, plan.symmetric, plan.form, plan.classes).pairs)
        return
    read = sum(rows + (0 if diagonal and plan.symmetric else columns) for rows, columns, diagonal in tiles)
    if entry.method == "contract" and entry.factors is not None:
        work = contracted(entry.factors, plan.samples, plan.symmetric, plan.form, plan.classes)
        one = entry.factor_bytes(1, plan.classes, plan.itemsize)
        pairs = 0 if entry.single else 2 * 2 * 8 * work.pairs  # both products in float64, written and read
    else:
        work = materialised(flops, entry.numel, plan.samples, plan.symmetric, plan.form, plan.classes)
        one, pairs = entry.numel * plan.classes * plan.itemsize, 0
    entry.gradient_flops, entry.product_flops = int(work.gradients), int(work.products + 2 * work.pairs)
    entry.memory = one * plan.everyone
    entry.bytes = int(entry.memory + read * one + pairs)
    if entry.method == "stream":  # the factors are held, written and read once; the gradients are formed from them
        entry.memory = entry.factor_bytes(plan.everyone, plan.classes, plan.itemsize)
        entry.bytes += 2 * entry.memory
