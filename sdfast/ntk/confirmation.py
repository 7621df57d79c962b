"""What was found of a model before is confirmed by a pass at hand: three samples' gradients are autograd's again.

The three are compared at once, as in guard (b) of `probe`, out of the micro-batches in which they really lie.
"""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from sdfast.ntk.comparison import loop_what_differs, shares_of
from sdfast.ntk.sample_rows import PathChangedError


class Confirmation:
    """Gathers the captured gradients of some samples from the chunks of a pass, and compares them with autograd's.

    Args:
        columns: The only output of these samples as a batch of their own (samples, 1), with its graph.
        samples: Their numbers.
        parameters: By name.
    """

    def __init__(self, columns: Tensor, samples: list[int], parameters: Mapping[str, Tensor]) -> None:
        self.columns, self.samples = columns, samples
        self.left = dict(parameters)  # not compared yet
        self.rows: dict[str, list[Tensor]] = {}
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def begin(self) -> None:
        """A pass begins: what another one left unfinished is forgotten."""
        self.rows, self.factors = {}, {}

    def take(
        self, start: int, stop: int, rows: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Keeps what the samples from `start` to `stop` give of those that are compared."""
        for sample in self.samples:
            if start <= sample < stop:
                own = slice(sample - start, sample - start + 1)
                for name in rows.keys() & self.left.keys():
                    self.rows.setdefault(name, []).append(rows[name][own].clone())
                for name in factors.keys() & self.left.keys():
                    a, b = factors[name]
                    self.factors.setdefault(name, []).append((a[own].clone(), b[own].clone()))

    def compare(self) -> None:
        """At the end of a pass.

        Raises:
            PathChangedError: A gradient is another than autograd's.
        """
        rows = {name: torch.cat(parts) for name, parts in self.rows.items() if len(parts) == len(self.samples)}
        factors = {
            name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))
            for name, parts in self.factors.items()
            if len(parts) == len(self.samples)
        }
        self.begin()
        sources = {name: self.left.pop(name) for name in (*rows, *factors)}
        if not sources:
            return
        sizes = {name: _size(a) * _size(b) if a.is_floating_point() else _size(b) for name, (a, b) in factors.items()}
        shares = shares_of(rows | sizes, self.columns, torch.Generator().manual_seed(0))
        try:
            gradients = torch.autograd.grad(
                self.columns[:, 0] @ shares, list(sources.values()), retain_graph=bool(self.left), allow_unused=True
            )
        except RuntimeError as error:  # what it needs was overwritten since
            raise PathChangedError(f"its gradient cannot be taken any longer: {error}") from error
        exact = {
            name: torch.zeros_like(source) if gradient is None else gradient
            for (name, source), gradient in zip(sources.items(), gradients, strict=True)
        }
        differing: dict[str, str] = {}
        loop_what_differs(exact, rows, shares, differing, factors)
        if differing:
            name, reason = next(iter(differing.items()))
            raise PathChangedError(f"{name} is used in another way than before: {reason}")


def graph_of(columns: Tensor, parameters: Mapping[str, Tensor]) -> Hashable:
    """How outputs were computed: the nodes of their graph by name, how they hang together, and the parameters in it.

    Whatever the values, a use of a parameter that no torch function shows is in there, as is another path.

    Args:
        columns: The outputs.
        parameters: Those that are told apart, by name.

    Returns:
        Equal for two graphs that are alike.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    numbers = {columns.grad_fn: 0}
    nodes = []
    waiting = [columns.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        sources = []
        for source, output in node.next_functions:
            if source is not None and source not in numbers:
                numbers[source] = len(numbers)
                waiting.append(source)
            sources.append((-1 if source is None else numbers[source], output))
        leaf = names.get(id(node.variable), "") if hasattr(node, "variable") else None
        nodes.append((numbers[node], node.name(), leaf, tuple(sources)))
    return tuple(nodes)


def _size(side: Tensor) -> Tensor:
    """Of each sample's part of a factor (samples, 1)."""
    return torch.linalg.vector_norm(side.reshape(len(side), -1), dim=1, keepdim=True)
