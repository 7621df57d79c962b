"""The plan of a Gram matrix before it is computed: the very object that `gram` follows, with costs and predictions."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from sdfast.ntk import calibration, costs
from sdfast.ntk import inputs as feeding
from sdfast.ntk.blocks import groups_of
from sdfast.ntk.costs import Rates
from sdfast.ntk.plan import Plan, make_plan
from sdfast.ntk.request import request_of
from sdfast.ntk.result import tiles_of
from sdfast.ntk.source import Source
from sdfast.ntk.unchanged import unchanged
from sdfast.ntk.verified import retried


def plan(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str | int | Callable[[Any], Tensor] | None = None,
    precision: str | None = None,
    params: Iterable[str] | Callable[[str], bool] | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    calibrate: bool = False,
) -> Plan:
    """How `gram` computes the matrix of the same arguments: method, FLOPs, bytes, passes and memory per parameter.

    Takes a few forward and backward passes of three samples; ``print(plan)`` shows a table. FLOPs of the model's own
    passes are those of matrix products, convolutions and attention.

    Args:
        model: As `gram` takes it; it is left as it is.
        x1: As `gram` takes it.
        x2: As `gram` takes it.
        outputs: As `gram` takes it.
        precision: As `gram` takes it.
        params: As `gram` takes it.
        batch_size: As `gram` takes it.
        memory: As `gram` takes it.
        calibrate: Time two real micro-batches of up to three groups, and the products of one tile, and predict the
            seconds of the whole; measure the rates that decide between two methods whose FLOPs nearly tie. Given to
            `gram`, the plan makes it decide by these.

    Returns:
        The plan.

    Raises:
        TypeError: An argument has the wrong type, or parameters are in half precision.
        ValueError: `outputs` is missing, samples are coupled or drawn at random.
        NotImplementedError: `calibrate` with batch norm in training mode, which has no micro-batches to time.
        MemoryError: `memory` is too small for one column of gradients.
    """
    if not isinstance(calibrate, bool):
        raise TypeError(f"calibrate: got {type(calibrate).__name__}, wanted True or False")
    request = request_of(model, outputs, params, precision, batch_size, memory)
    with unchanged(model, request.device):
        rows, columns = request.sides(x1, x2)

        def compute(afresh: bool) -> Plan:
            left, right = request.sources(rows, columns, afresh=afresh)
            if calibrate and left.findings.batch_norm_trains:
                raise NotImplementedError(
                    "calibrate: batch norm is in training mode, so all samples are one batch, and there are no "
                    "micro-batches to time; call model.eval(), or plan without calibrate"
                )
            dtype, device, precision = request.first.dtype, request.device, request.precision
            rates = calibration.measure_rates(dtype, device, precision) if calibrate else None
            made = plan_of(left, right, precision, request.memory, rates)
            _fill_costs(made, left)
            if calibrate:
                made.seconds = calibration.predict(made, left, right)
            return made

        return retried(model, compute)


def plan_of(
    left: Source, right: Source, precision: str, memory: int, rates: Rates | None = None, shares: int = 1
) -> Plan:
    """Methods and groups; the one place where they are chosen for a Gram matrix.

    Args:
        left: Of the rows.
        right: Of the columns; `left` itself for a symmetric matrix.
        precision: Of the products.
        memory: Bytes of a group.
        rates: Measured ones; ``None`` for those recorded for this kind of device, if any.
        shares: Processes that divide the groups: where one group would hold all, it is cut for them.

    Returns:
        The plan, without costs.
    """
    first = next(iter(left.parameters.values()))
    rates = calibration.RECORDED.get(first.device.type) if rates is None else rates
    samples, form, classes = (left.samples, right.samples), left.outputs.form, left.classes
    # On a GPU memory is there at once, and many small products would wait for their launches.
    streamed = first.device.type == "cpu" and _tiles_bytes(left, right) <= memory // 8
    symmetric = right is left
    made = make_plan(left.findings, left.parameters, form, classes, samples, symmetric, memory, rates, streamed)
    made.form, made.classes, made.samples, made.symmetric = form, classes, samples, symmetric
    made.precision, made.batch_size, made.memory = precision, left.batch_size, memory
    made.itemsize, made.rates = first.element_size(), rates
    made.activations = max(left.batch_size, right.batch_size) * left.findings.activations
    # Beside streamed factors lie the columns that are formed from them and the tiles of H, each an eighth at most.
    share = memory - (memory // 4 if any(entry.method == "stream" for entry in made.entries) else 0)
    if shares > 1:
        column = made.everyone * classes * made.itemsize
        share = max(column, min(share, -(-_held(made, column) // shares)))
    made.groups = groups_of(made, made.everyone, classes, made.itemsize, share)
    return made


def _tiles_bytes(left: Source, right: Source) -> int:
    """Of all tiles of H in float64, which streamed parameters add to side by side."""
    area = sum(
        (rows.stop - rows.start) * (columns.stop - columns.start)
        for rows, columns in tiles_of(left.samples, right.samples, right is left, left.outputs.form)
    )
    blocks = {"full": left.classes**2, "per_class": left.classes}.get(left.outputs.form, 1)
    return 8 * area * blocks


def _held(made: Plan, column: int) -> int:
    """Bytes of all gradients and factors together."""
    return sum(
        entry.factor_bytes(made.everyone, made.classes, made.itemsize)
        if entry.method in ("contract", "stream")
        else entry.numel * column * (entry.method != "zero")
        for entry in made.entries
    )


def _fill_costs(made: Plan, source: Source) -> None:
    tiles = [
        (rows.stop - rows.start, columns.stop - columns.start, rows == columns)
        for rows, columns in tiles_of(*made.samples, made.symmetric, made.form)
    ]
    costs.count(made, source.findings.work, _forward_flops(source), tiles)


class _Unhooked(ModuleTracker):
    """Tells no module from another: the hooks that do fail in a model that takes gradients inside."""

    def __enter__(self) -> "_Unhooked":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _forward_flops(source: Source) -> int:
    """Of one sample, as torch's counter knows them."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Unhooked()
    with counter:
        feeding.call(source.model, source.inputs.pick([0, source.samples // 2, source.samples - 1]))
    return counter.get_total_flops() // 3


def rates_of(given: object) -> Rates | None:
    """The rates of a plan that the user gave to `gram`.

    Raises:
        TypeError: It is no plan.
    """
    if given is None:
        return None
    if not isinstance(given, Plan):
        raise TypeError(f"plan: got {type(given).__name__}, wanted what sdfast.ntk.plan gives, or None")
    return given.rates


def check_plan(given: Plan, made: Plan) -> None:
    """Refuses a plan that was made for another call.

    Args:
        given: By the user.
        made: Of this call.

    Raises:
        ValueError: They differ in what they are for.
    """
    settings = given.settings()
    for name, value in made.settings().items():
        if settings[name] != value:
            raise ValueError(f"plan: was made for {name} {settings[name]}, and this call has {value}; plan anew")
