"""What the probe found out of a model that is asked about again: kept while the model is built the same.

The findings say how a model uses its parameters, not what these are. They are kept for a model all of whose modules
hold plain attributes alone, by which a change would show, and which had nothing about it that may differ from batch to
batch. Still they are not trusted: every time, gradients that they give for samples at hand are compared with autograd's
on the model as it is (those of three samples; of a single output as the micro-batches give them), and the graph of
their outputs with the probe's; the random generators are watched, and the outputs of the three in their micro-batches
are compared with theirs as a batch of their own. Where a pass shows that the findings do not hold, as every tenth time,
all is found out anew. Nothing of a model or its samples is kept alive.
"""

import dataclasses
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdfast.ntk import layers
from sdfast.ntk.findings import Findings
from sdfast.ntk.inputs import Inputs
from sdfast.ntk.memory_format import FormatRefusedError, refuse
from sdfast.ntk.outputs import Outputs
from sdfast.ntk.probe import confirmed, probe
from sdfast.ntk.sample_rows import PathChangedError

AFRESH = 10  # times from one probe of a model to the next
_FEW = 3  # samples that would be compared with themselves
_KEPT = 8  # findings of one model: for other outputs, parameters or shapes
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)
_T = TypeVar("_T")
_OF_MODULES = frozenset(nn.Module().__dict__)


@dataclass
class _Kept:
    """Findings, the number of outputs, and how often they were used again."""

    findings: Findings
    classes: int
    used: int = 0


class _Model:
    """Of one model: its state, and what was found in it."""

    def __init__(self, state: list[Any]) -> None:
        self.state = state
        self.kept: dict[Any, _Kept] = {}


_models: weakref.WeakKeyDictionary[nn.Module, _Model] = weakref.WeakKeyDictionary()


def findings_of(
    model: nn.Module, inputs: Inputs, outputs: Outputs, parameters: Mapping[str, Tensor], afresh: bool = False
) -> Findings:
    """What `probe` finds, or found before and was seen to hold still.

    Args:
        model: See `probe`.
        inputs: See `probe`.
        outputs: See `probe`.
        parameters: See `probe`.
        afresh: Do not look at what was found before.

    Returns:
        The findings.

    Raises:
        ValueError: See `probe`.
    """
    key = _key(inputs, outputs, parameters) if _is_plain_model(model) else None
    if key is None:
        return probe(model, inputs, outputs, parameters)
    state = state_of(model)
    known = _models.get(model)
    if known is None or known.state != state:
        known = _models[model] = _Model(state)
    kept = known.kept.pop(key, None)
    if kept is not None and not afresh and kept.used + 1 < AFRESH:
        kept.used += 1
        found = found_again(model, inputs, outputs, parameters, kept.findings, kept.classes)
        if found is not None:
            known.kept[key] = kept
            return found
    findings = probe(model, inputs, outputs, parameters)
    if not (findings.reads or findings.looped or findings.unused or findings.batch_norm_trains):
        while len(known.kept) >= _KEPT:
            known.kept.pop(next(iter(known.kept)))  # the one not used for the longest
        known.kept[key] = _Kept(dataclasses.replace(findings.copied(), answers={}), outputs.classes)
    return findings


def found_again(
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs,
    parameters: Mapping[str, Tensor],
    findings: Findings,
    classes: int,
) -> Findings | None:
    """A copy of findings of another time, for these inputs; ``None`` where they do not hold.

    Args:
        model: See `probe`.
        inputs: See `probe`.
        outputs: See `probe`.
        parameters: See `probe`.
        findings: They stay as they are.
        classes: Outputs then.

    Returns:
        The copy, for a `Source` of these inputs, which goes on comparing.

    Raises:
        ValueError: The model draws random numbers.
    """
    if inputs.samples <= _FEW:
        return None
    try:
        found = confirmed(model, inputs, outputs, parameters, findings.copied())
    except Exception:
        if not findings.channels_last:
            raise
        return None  # by now the model may mind the format: the probe calls it as it was given first
    return found if outputs.classes == classes else None


def retried(model: nn.Module, compute: Callable[[bool], _T], afresh: bool = False) -> _T:
    """What `compute` gives; once more, with the model probed, where what it rests on turns out not to hold.

    Findings of another time may not, and a model may fail in a memory format that it was tried in.

    Args:
        model: The model.
        compute: Takes whether to probe the model whatever is known of it.
        afresh: Do so from the start.

    Returns:
        Its result.
    """
    try:
        if not afresh:
            try:
                return compute(False)
            except PathChangedError:
                pass
        return compute(True)
    except FormatRefusedError:
        refuse(model)
        return compute(True)


def forget(model: nn.Module) -> None:
    """What was found of a model does not hold any longer."""
    _models.pop(model, None)


def state_of(model: nn.Module) -> list[Any]:
    """What findings may rest on, but for the values of parameters and buffers.

    Args:
        model: The model.

    Returns:
        Numbers, names, types and functions of classes that compare equal while nothing of it changed.
    """
    state: list[Any] = [torch.get_default_dtype(), layers.registered()]
    for name, module in model.named_modules():
        hooks = [list(held) for key, held in module.__dict__.items() if key.endswith("_hooks")]  # by their handles
        plain = [(key, _plainly(value)) for key, value in module.__dict__.items() if _is_plain(value)]
        state.append((name, id(module), type(module), _function(module.forward), hooks, plain))
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        own = (id(tensor), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ()
        state.append((name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, *own))
    return state


def _key(inputs: Inputs, outputs: Outputs, parameters: Mapping[str, Tensor]) -> Any:
    """What a model is asked, but for the samples; ``None`` where that is a function, which may change."""
    if callable(outputs.asked):
        return None
    shapes = tuple((key, tuple(tensor.shape[1:]), tensor.dtype) for key, tensor in inputs.tensors.items())
    return outputs.asked, shapes, inputs.device, tuple(parameters)


def _is_plain_model(model: nn.Module) -> bool:
    """Whether a change of what its modules are would show: none holds anything that `state_of` cannot compare."""
    by_identity = type(model).__eq__ is nn.Module.__eq__ and type(model).__hash__ is nn.Module.__hash__
    return by_identity and all(
        not isinstance(module, torch.jit.ScriptModule)
        and "forward" not in module.__dict__
        and _is_plain_class(type(module))
        and all(key in _OF_MODULES or _is_plain(value) for key, value in module.__dict__.items())
        for module in model.modules()
    )


def _is_plain_class(cls: type) -> bool:
    """Whether its methods see no variables of a function around them, which may change."""
    return all(
        set(function.__code__.co_freevars) <= {"__class__"}
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if isinstance(function, types.FunctionType)
    )


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(part) in _PLAIN for part in value)
    if type(value) is list:  # as a convolution holds its padding
        return all(type(part) is int for part in value)
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return type(value) in _PLAIN or isinstance(value, types.BuiltinFunctionType)


def _plainly(value: Any) -> Any:
    """What stays as it is when the value changes."""
    return tuple(value) if isinstance(value, list) else value


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
