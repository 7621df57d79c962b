"""The Gram matrix of a model that trains, again and again on the same samples: what the probe found out is kept.

How a model uses its parameters does not change when it learns. So the probe's findings serve until something changes
that they may rest on: a module, its plain attributes, hooks or mode, a parameter or its shape, the samples; each time
they are confirmed as in `verified`. They are found anew at every tenth matrix all the same, and at each one of a model
that reads values to choose its path.
"""

from typing import Any

from torch import Tensor, nn

from sdfast.ntk import inputs as feeding
from sdfast.ntk.findings import Findings
from sdfast.ntk.gram import gram_of
from sdfast.ntk.memory_format import FormatRefusedError, refuse
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.request import MEMORY
from sdfast.ntk.sample_rows import PathChangedError
from sdfast.ntk.source import Source, select_parameters
from sdfast.ntk.unchanged import unchanged
from sdfast.ntk.verified import found_again, retried, state_of

_HELD = 2**28  # bytes that may be kept from matrix to matrix


class RepeatedGram:
    """``gram(model, x, outputs=outputs)``, equal to it in every bit.

    Args:
        outputs: As `gram` takes it.
        afresh: Matrices from one probe of the model to the next.
    """

    def __init__(self, outputs: Any, afresh: int = 10) -> None:
        self.asked, self.afresh = outputs, afresh
        self.reused = 0  # times since the findings were found
        self._findings: Findings | None = None
        self._outputs = Outputs(outputs)
        self._state: list[Any] = []
        self._spare: Tensor | None = None

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """H of the model as it is, and what its passes gave on the way.

        Args:
            model: As `gram` takes it.
            x: Its samples; found to be the same ones by identity and by not having been written to.

        Returns:
            H, and the model's output (n, ...).
        """
        parameters = select_parameters(model, None)
        first = next(iter(parameters.values()))
        with unchanged(model, first.device):
            inputs = feeding.read(x.to(first.device), first, "inputs")
            state = [id(x), x._version, tuple(x.shape), *state_of(model)]
            if self._findings is not None and self.reused + 1 < self.afresh and state == self._state:
                self.reused += 1
                found = found_again(model, inputs, self._outputs, parameters, self._findings, self._outputs.classes)
                if found is not None:
                    try:
                        return _matrix(Source(model, inputs, self._outputs, parameters, None, found, memory=MEMORY,
                                              keep_outputs=True, spare=self._spare, of_these=True))  # fmt: skip
                    except PathChangedError:
                        pass  # the findings hold no longer: probed below as if for the first time
                    except FormatRefusedError:
                        refuse(model)
            self._spare = None
            self._findings, self._outputs, self._state, self.reused = None, Outputs(self.asked), state, 0

            def compute(_: bool) -> tuple[tuple[Tensor, Tensor], Source]:
                source = Source(
                    model, inputs, self._outputs, parameters, None, keep_outputs=True, afresh=True, memory=MEMORY
                )
                return _matrix(source), source

            result, source = retried(model, compute, afresh=True)
            found = source.findings
            if not (found.reads or found.all_looped or found.batch_norm_trains):
                self._findings, self._spare = found, self._memory(source)
        return result

    @staticmethod
    def _memory(source: Source) -> Tensor | None:
        """For the panel of the next time, where that is not too much to hold while a model trains.

        Memory fresh from the system costs more than the gradients that are written to it, and what the system may take
        back (see `panels`) still costs a fault a page.
        """
        first = next(iter(source.parameters.values()))
        return first.new_empty(source.widest) if source.widest * first.element_size() <= _HELD else None


def _matrix(source: Source) -> tuple[Tensor, Tensor]:
    return gram_of(source), source.model_output()
