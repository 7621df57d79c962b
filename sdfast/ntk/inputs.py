"""What a model is fed: tensors with the samples along the first axis, in micro-batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, default_collate

from sdfast import _checks


class Inputs:
    """All samples, and how a model is called on some of them.

    Attributes:
        tensors: By position (int) or by name (str), each (samples, ...).
        samples: How many.
        channels_last: Whether the model is given its pictures (samples, channels, height, width) in that memory format.
    """

    def __init__(self, tensors: dict[int | str, Tensor], device: torch.device, name: str) -> None:
        for key, tensor in tensors.items():
            part = name if list(tensors) == [0] else f"{name}[{key!r}]"
            _checks.check_tensor(part, tensor)
            if tensor.dim() == 0:
                raise ValueError(f"{part}: got a tensor without axes, wanted the samples along the first")
        sizes = {key: len(tensor) for key, tensor in tensors.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{name}: got {sizes} samples, wanted the same number in every tensor")
        self.tensors, self.name, self.device = tensors, name, device
        self.samples, self.channels_last = next(iter(sizes.values())), False
        if self.samples == 0:
            raise ValueError(f"{name}: got no sample, wanted at least one")

    def rows(self, start: int, stop: int) -> dict[int | str, Tensor]:
        """Copies of some samples, which the model may overwrite."""
        return {key: self._copied(tensor[start:stop]) for key, tensor in self.tensors.items()}

    def pick(self, indices: list[int]) -> dict[int | str, Tensor]:
        """Copies of the samples of these indices."""
        return {key: self._copied(tensor[indices]) for key, tensor in self.tensors.items()}

    def _copied(self, tensor: Tensor) -> Tensor:
        last = self.channels_last and is_picture(tensor)
        return tensor.to(self.device, copy=True, memory_format=torch.channels_last if last else torch.preserve_format)


def is_picture(tensor: Tensor) -> bool:
    """Whether it has the axes of pictures (samples, channels, height, width)."""
    return tensor.dim() == 4 and tensor.is_floating_point()


def call(model: nn.Module, tensors: Mapping[int | str, Tensor]) -> Any:
    """The model on these tensors, by position or by name."""
    positional = [tensor for key, tensor in tensors.items() if isinstance(key, int)]
    return model(*positional, **{key: tensor for key, tensor in tensors.items() if isinstance(key, str)})


def read(x: object, parameter: Tensor, name: str) -> Inputs:
    """Inputs from a tensor, a tuple, list or dict of tensors, a dataset or a loader.

    Args:
        x: One of those; of a dataset's or loader's (input, label) pairs the input alone, which may be several tensors.
        parameter: Of the model: its device and dtype are wanted.
        name: Of the argument, for errors.

    Returns:
        The inputs.

    Raises:
        TypeError: `x` is none of those.
        ValueError: It is empty, its items have more parts than an input and a label, or its tensors have different
            lengths, another device or another floating dtype.
    """
    moves = isinstance(x, Dataset | DataLoader)
    if isinstance(x, DataLoader):
        x = _read_loader(x, name)
    elif isinstance(x, Dataset):
        x = _read_dataset(x, name)
    if isinstance(x, Tensor):
        tensors: dict[int | str, Tensor] = {0: x}
    elif isinstance(x, tuple | list) and x:
        tensors = dict(enumerate(x))
    elif isinstance(x, Mapping) and x and all(isinstance(key, str) for key in x):
        tensors = dict(x)
    else:
        raise TypeError(
            f"{name}: got {type(x).__name__}, wanted a tensor, a tuple or dict of tensors, a dataset or a DataLoader"
        )
    inputs = Inputs(tensors, parameter.device, name)
    for key, tensor in tensors.items():
        part = name if list(tensors) == [0] else f"{name}[{key!r}]"
        if tensor.device != parameter.device and not moves:
            raise ValueError(f"{part}: is on {tensor.device}, wanted {parameter.device} as the model's parameters")
        if tensor.is_floating_point() and tensor.dtype != parameter.dtype:
            wanted = _checks.dtype_name(parameter)
            raise ValueError(f"{part}: got {_checks.dtype_name(tensor)}, wanted {wanted} as the model's parameters")
    return inputs


def _read_loader(loader: DataLoader, name: str) -> Any:
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, RandomSampler | SubsetRandomSampler):
        raise ValueError(f"{name}: the loader shuffles, so the rows of H would have no known order; use shuffle=False")
    return _joined([_input_of(batch, name) for batch in loader], name)


def _read_dataset(dataset: Dataset, name: str) -> Any:
    if isinstance(dataset, IterableDataset):
        items = [_input_of(item, name) for item in dataset]
    else:
        items = [_input_of(dataset[index], name) for index in range(len(dataset))]  # type: ignore[arg-type]
    if not items:
        raise ValueError(f"{name}: got no sample, wanted at least one")
    return default_collate(items)


def _input_of(item: Any, name: str) -> Any:
    """The input of an item: what comes before the label."""
    if isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise ValueError(
                f"{name}: got an item of {len(item)} parts, wanted (input,) or (input, label); several inputs are one "
                "part, ((a, b), label) or ({'name': a}, label)"
            )
        return item[0]
    return item


def _joined(batches: list[Any], name: str) -> Any:
    if not batches:
        raise ValueError(f"{name}: got no sample, wanted at least one")
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {key: torch.cat([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    raise TypeError(f"{name}: the loader gave {type(first).__name__}, wanted tensors")
