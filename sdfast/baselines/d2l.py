"""D2L: trust in the labels falls once the dimension of the learned features stops shrinking."""

import statistics
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from sdfast import _checks
from sdfast.baselines.method import Method
from sdfast.ops.self_distillation import LossStats, self_distillation_loss


def d2l(neighbours: int = 20, batches: int = 10, window: int = 5) -> "DimensionalityDriven":
    """Cross entropy of α y + (1 − α) hardmax(f(x)), with α from the local intrinsic dimension (LID) of the features.

    After each epoch its LID is the mean over its last batches. Once one lies more than two standard deviations above
    the mean of the `window` epochs before it, every later epoch t of T takes::

        α = exp(−(t / T) · LID_{t−1} / min_{j<t−1} LID_j)

    and before that α = 1. The features are the inputs of the model's last linear layer. The authors' code waits some
    epochs more, measures them on batches drawn anew, and goes back to the weights saved before the turning point; here
    they are those of the training batches that pass by, and training goes on.

    Args:
        neighbours: k of the estimate; batches with fewer other rows are passed over.
        batches: How many of an epoch's last batches are looked at.
        window: How many epochs' LID the turning point is judged by.

    Returns:
        The method.

    Reference:
        Ma et al. 2018, "Dimensionality-Driven Learning with Noisy Labels", algorithm 1 and equations 4 to 6.
    """
    return DimensionalityDriven(neighbours, batches, window)


def local_intrinsic_dimension(features: Tensor, neighbours: int) -> Tensor:
    """The mean over the rows of −1 / mean_i log(r_i / r_k), r_i the distance to the i-th nearest other row.

    Args:
        features: (N, D).
        neighbours: k, below N.

    Returns:
        A 0-d tensor; rows among whose k neighbours all distances are equal, zeros included, are left out.

    Reference:
        Amsaleg et al. 2015, "Estimating Local Intrinsic Dimensionality", the maximum likelihood estimate.
    """
    distances = torch.cdist(features.float(), features.float()).fill_diagonal_(torch.inf)
    nearest = distances.topk(neighbours, largest=False).values.clamp(min=1e-12)  # (N, k), ascending
    dimension = -1 / (nearest / nearest[:, -1:]).log().mean(-1)
    return dimension[dimension.isfinite()].mean()


class DimensionalityDriven(Method):
    """See `d2l`.

    Attributes:
        dimensions: The LID of each epoch so far.
        turned: The epoch from which on α is below 1, or ``None``.
    """

    looks_into_model = True

    def __init__(self, neighbours: int, batches: int, window: int) -> None:
        for name, value, least in (("neighbours", neighbours, 1), ("batches", batches, 1), ("window", window, 2)):
            _checks.check_least(name, value, least)
        super().__init__("d2l", neighbours=neighbours, batches=batches, window=window)
        self.neighbours, self.window = neighbours, window
        self.dimensions: list[float] = []
        self.turned: int | None = None
        self._measured: deque[Tensor] = deque(maxlen=batches)
        self._features: Tensor | None = None
        self._hook: Any = None

    def watch(self, model: nn.Module) -> None:
        """Looks at the inputs of the model's last linear layer from now on."""
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError("model: has no torch.nn.Linear, whose inputs the method d2l takes for features")
        if self._hook is not None:
            self._hook.remove()
        self._hook = layers[-1].register_forward_pre_hook(self._look)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Closes the epoch before."""
        super().set_epoch(epoch, epochs)
        if len(self.dimensions) >= epoch:  # a training that continues has it already
            return
        if not self._measured:
            raise ValueError(
                f"neighbours: got {self.neighbours}, but no batch of the last epoch had more rows, so d2l has nothing "
                "to measure"
            )
        self.dimensions.append(statistics.mean(self._last_dimensions()))
        self._measured.clear()
        if self.turned is None and len(self.dimensions) > self.window:
            before = self.dimensions[-1 - self.window : -1]
            if self.dimensions[-1] - statistics.mean(before) > 2 * statistics.stdev(before):
                self.turned = epoch

    def _last_dimensions(self) -> list[float]:
        """Of the epoch's last batches, measured only here: each measurement waits for the device."""
        return [float(x if x.dim() == 0 else local_intrinsic_dimension(x, self.neighbours)) for x in self._measured]

    def alpha(self) -> float:
        """The weight of the given label in this epoch."""
        if self.turned is None:
            return 1.0
        ratio = self.dimensions[-1] / min(self.dimensions[:-1])
        return float(torch.tensor(-self.epoch / self.epochs * ratio).exp())

    def compute(self, logits: Tensor, labels: Tensor, indices: Tensor | None) -> tuple[Tensor, LossStats]:
        """The loss; the features of the batch are kept to be measured."""
        if self._features is None:
            raise RuntimeError("d2l: has seen no features; call method.watch(model) before the model")
        if len(self._features) > self.neighbours:
            self._measured.append(self._features)
        self._features = None
        return self_distillation_loss(logits, labels, self.alpha(), return_stats=True)  # type: ignore[return-value]

    def get_extra_state(self) -> dict[str, Any]:
        """The dimensions so far."""
        measured = self._last_dimensions()
        return {"dimensions": list(self.dimensions), "turned": self.turned, "measured": measured}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up the dimensions of a run that was cut short."""
        self.dimensions, self.turned = list(state["dimensions"]), state["turned"]
        self._measured.clear()
        self._measured.extend(map(torch.tensor, state["measured"]))

    def _look(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.training and module.training:
            self._features = inputs[0].detach().flatten(1)
