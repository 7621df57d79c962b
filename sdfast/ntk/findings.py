"""What the probe found out of a model: how each of its parameters is used, and what gives its gradients per sample."""

import copy
from collections.abc import Hashable
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from sdfast.ntk.capture import Step


@dataclass
class Findings:
    """What the probe found.

    Attributes:
        steps: The differentiable calls of a forward pass.
        looped: Parameters that are differentiated one sample at a time, with the reason.
        unused: Parameters that no output depends on.
        batch_norm_trains: Whether batch norm couples the samples: then all parameters are looped, in one batch.
        all_looped: Whether a batch took another path than the probe, and all parameters were looped for it.
        rules: By parameter: the names of the rules that serve it.
        factors: By parameter that can be contracted: (T, d, p), d = 0 where A holds tokens.
        biases: By bias of a layer with one position: its weight, whose factors hold its gradient too.
        work: By parameter: FLOPs of one sample's gradient of one output.
        reads: Whether the model makes numbers of Python out of values, which may choose its path.
        activations: Bytes of what the operations on one sample give.
        channels_last: Whether the model is given its pictures in that memory format; see `memory_format`.
        large_pictures: Whether that was to be tried, by the sizes of these inputs.
        answers: Outputs of the probe's samples, by their number: what no batch may change but by rounding.
        graph: How the outputs of three samples were computed; see `confirmation.graph_of`.
        products: Whether batch norm may be run by `batch_norm.run`, as far as was seen.
        reused: Whether these are findings of another time.
        before: Then the only output of the probe's samples, with its graph: the first pass is still to be compared
            with its gradients.
    """

    steps: list[Step] = field(default_factory=list)
    looped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    batch_norm_trains: bool = False
    all_looped: bool = False
    rules: dict[str, list[str]] = field(default_factory=dict)
    factors: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    work: dict[str, int] = field(default_factory=dict)
    reads: bool = False
    activations: int = 0
    channels_last: bool = False
    large_pictures: bool = False
    answers: dict[int, Tensor] = field(default_factory=dict)
    graph: Hashable = None
    products: bool = True
    reused: bool = False
    before: Tensor | None = None

    def take(self, other: "Findings") -> None:
        """Becomes what the other is."""
        for part in fields(self):
            setattr(self, part.name, getattr(other, part.name))

    def copied(self) -> "Findings":
        """What may be changed without a trace in the original."""
        copied = copy.copy(self)
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, dict | list):
                setattr(copied, part.name, value.copy())
        copied.steps = [replace(step) for step in self.steps]
        return copied
