"""The plan of a Gram matrix before it is computed: the very object that `gram` follows, with costs and predictions."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdfast import _checks
from sdfast.ntk import calibration, costs
from sdfast.ntk import inputs as feeding
from sdfast.ntk.blocks import groups_of
from sdfast.ntk.costs import Rates
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.plan import Plan, make_plan
from sdfast.ntk.products import PRECISIONS
from sdfast.ntk.result import tiles_of
from sdfast.ntk.sample_gradients import check_batch_size
from sdfast.ntk.source import Source, select_parameters
from sdfast.ntk.unchanged import unchanged
from sdfast.ntk.verified import retried

MEMORY = 2**31  # bytes: fixed, so that the groups, and with them the last bits, do not depend on what else runs


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
    asked = Outputs(outputs)
    parameters = select_parameters(model, params)
    first = next(iter(parameters.values()))
    precision = check_precision(precision, first)
    check_batch_size(batch_size)
    memory = check_memory(memory)
    with unchanged(model, first.device):
        rows = feeding.read(x1, first, "x1")
        columns = None if x2 is None else feeding.read(x2, first, "x2")

        def compute(afresh: bool) -> Plan:
            left = Source(model, rows, asked, parameters, batch_size, afresh=afresh, memory=memory)
            right = left
            if columns is not None:
                right = Source(model, columns, asked, parameters, batch_size, left.findings, memory=memory)
            if calibrate and left.findings.batch_norm_trains:
                raise NotImplementedError(
                    "calibrate: batch norm is in training mode, so all samples are one batch, and there are no "
                    "micro-batches to time; call model.eval(), or plan without calibrate"
                )
            rates = calibration.measure_rates(first.dtype, first.device, precision) if calibrate else None
            made = plan_of(left, right, precision, memory, rates)
            _fill_costs(made, left)
            if calibrate:
                made.seconds = calibration.predict(made, left, right)
            return made

        return retried(compute)


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


def _forward_flops(source: Source) -> int:
    """Of one sample, as torch's counter knows them."""
    with FlopCounterMode(display=False) as counter:
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


def check_precision(precision: str | None, parameter: Tensor) -> str:
    """The precision; the parameters' dtype where ``None``."""
    if precision is None:
        return _checks.dtype_name(parameter)
    _checks.check_option("precision", precision, PRECISIONS)
    return precision


def check_memory(memory: object) -> int:
    """The bytes that gradients may take at a time; the default where ``None``."""
    if memory is None:
        return MEMORY
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory: got {type(memory).__name__}, wanted a number of bytes or None")
    if memory < 1:
        raise ValueError(f"memory: got {memory}, wanted at least 1 byte")
    return memory
