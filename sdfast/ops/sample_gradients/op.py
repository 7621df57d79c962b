"""The private operations behind the gradients per sample: schemas and fakes. They write into rows they are given."""

from typing import NamedTuple

import torch

_SCHEMAS = (
    "_sample_convolution{suffix}(Tensor input, Tensor gradient, Tensor(a!) out, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool accumulate) -> ()",
    "_sample_channels{suffix}(Tensor? input, Tensor gradient, Tensor? mean, Tensor? rstd, Tensor(a!)? weight, "
    "Tensor(b!)? bias, bool accumulate) -> ()",
    "_sample_positions{suffix}(Tensor input, Tensor gradient, bool centered, float eps, Tensor(a!)? weight, "
    "Tensor(b!)? bias, bool accumulate) -> ()",
)

library = torch.library.Library("sdfast", "FRAGMENT")  # outlives the operations: they end with it
_NAMES = ("convolution", "channels", "positions")
for _suffix in ("", "_triton"):
    for _name, _schema in zip(_NAMES, _SCHEMAS, strict=True):
        library.define(_schema.format(suffix=_suffix))
        torch.library.register_fake(f"sdfast::_sample_{_name}{_suffix}", lambda *_: None)


def _triton(name):
    def launch(*arguments):
        from sdfast.ops.sample_gradients import triton_impl  # triton is imported by its first call, never before

        getattr(triton_impl, name)(*arguments)

    return launch


for _name in _NAMES:
    for _key in ("CPU", "CUDA", "XPU"):  # CPU tensors: in Triton's interpreter
        library.impl(f"_sample_{_name}_triton", _triton(_name), _key)


class Operations(NamedTuple):
    """The operations of one backend."""

    convolution: torch._ops.OpOverload
    channels: torch._ops.OpOverload
    positions: torch._ops.OpOverload


OPERATIONS = {
    backend: Operations(*(getattr(torch.ops.sdfast, f"_sample_{name}{suffix}").default for name in _NAMES))
    for backend, suffix in (("cpu", ""), ("triton", "_triton"))
}
