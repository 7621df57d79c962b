"""The function of one sample that is differentiated: refused where there is none, as where samples are coupled.

A sample's output may change neither with the other samples, nor with its place among them or their number, nor from
one call to the next; nor may its gradient. Batch norm in training mode alone may couple, and is held constant here.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sdfast.ntk.sample_rows import differs

COUPLED = "; only batch norm in training mode may couple samples"
STATE = (
    "model: called again on the same samples it gives another output, so it keeps a state or draws numbers of its own; "
    "call model.eval(), or take that out of its forward"
)


def far_apart(left: Tensor, right: Tensor, outputs: Tensor) -> bool:
    """Whether two tensors differ by more than other batch sizes round: a share of the largest of all outputs at hand.

    One alone says too little of that: it may be a sum of large numbers that is nearly 0.
    """
    allowed = (1e-9 if left.dtype == torch.float64 else 1e-3) * torch.nan_to_num(outputs, 0, 0, 0).abs().max()
    distance = (torch.nan_to_num(left, 0, 0, 0) - torch.nan_to_num(right, 0, 0, 0)).abs()
    return bool((distance > allowed).any()) or not torch.equal(left.isfinite(), right.isfinite())


def refuse_coupling(base: Tensor, perturbed: Sequence[Tensor], again: Callable[[], Tensor]) -> None:
    """Refuses outputs that change with another sample.

    Args:
        base: Outputs of three samples (3, classes).
        perturbed: The same with the first, the second, the third sample changed.
        again: Computes `base` once more, to tell a coupling from a state.

    Raises:
        ValueError: A sample's output changed that was not to.
    """
    for sample, other in enumerate(perturbed):
        changed = differs(base, other).any(1)
        changed[sample] = False
        if changed.any():
            _refuse_state(base, again)
            raise ValueError(f"model: the output of one sample changes with another sample of the batch{COUPLED}")


def refuse_places(base: Tensor, swapped: Tensor, again: Callable[[], Tensor]) -> None:
    """Refuses outputs that change with a sample's place in the batch, or with the number of samples.

    Args:
        base: Outputs of three samples (3, classes).
        swapped: Those of the second and the first sample alone, in this order.
        again: Computes `base` once more.

    Raises:
        ValueError: They differ.
    """
    if far_apart(base[[1, 0]], swapped, base):
        _refuse_state(base, again)
        raise ValueError(
            f"model: the output of one sample changes with its place in the batch, or with their number{COUPLED}"
        )


def refuse_other_answers(answers: Mapping[int, Tensor], columns: Tensor, start: int) -> None:
    """Refuses a micro-batch in which samples have other outputs than among the three of the probe.

    Args:
        answers: The outputs of the probe's samples by their number.
        columns: Outputs of the micro-batch.
        start: Number of its first sample.

    Raises:
        ValueError: They differ.
    """
    outputs = columns.detach()
    for sample, answer in answers.items():
        if start <= sample < start + len(columns) and far_apart(answer, outputs[sample - start], outputs):
            raise ValueError(
                f"model: the output of sample {sample} is another in a batch of {len(columns)} than of 3{COUPLED}"
            )


def refuse_other_pieces(columns: Tensor, piece: Callable[[int, int], Tensor]) -> None:
    """Refuses a micro-batch whose two halves have other outputs when they are computed alone.

    Args:
        columns: Outputs of the micro-batch.
        piece: Computes those of some of its samples alone.

    Raises:
        ValueError: They differ.
    """
    outputs, middle = columns.detach(), len(columns) // 2
    for first, last in ((0, middle), (middle, len(columns))) if middle else ():
        if far_apart(outputs[first:last], piece(first, last), outputs):
            raise ValueError(
                "model: it reads values of the samples to choose its path, and the output of one sample changes with "
                f"those beside it{COUPLED}"
            )


def refuse_coupled_gradients(names: Sequence[str], base: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Refuses gradients of one sample that change with the others, as a backward of one's own may make them.

    Args:
        names: Of parameters.
        base: Gradients of one sample's output.
        other: The same after the other samples changed.

    Raises:
        ValueError: They differ.
    """

    def size(gradient: Tensor) -> float:
        return float(torch.linalg.vector_norm(gradient.double().nan_to_num(0, 0, 0)))

    total = math.hypot(*map(size, base))
    own_share, share = (1e-9, 1e-11) if base[0].dtype == torch.float64 else (1e-3, 1e-5)
    for name, left, right in zip(names, base, other, strict=True):
        if size(left - right) > own_share * size(left) + share * total:
            raise ValueError(
                f"model: the gradient of one sample's output by {name} changes with another sample{COUPLED}"
            )


def _refuse_state(base: Tensor, again: Callable[[], Tensor]) -> None:
    if differs(base, again()).any():
        raise ValueError(STATE)
