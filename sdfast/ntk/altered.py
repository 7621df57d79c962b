"""Other values for a model's parameters and other numbers in a sample, by which the probe sees what depends on what."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sdfast.ntk.inputs import Inputs

_NORMALS = 8191  # that the jitter of a large parameter repeats: a prime, so that rows differ
_APART = 613  # of them from one parameter to the next


def jittered(parameters: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Other values of the same signs; zeros become small numbers, so that they block no gradient.

    Args:
        parameters: By name.
        generator: Of the random numbers.

    Returns:
        By name, of the same shapes and strides.
    """
    drawn = torch.randn(_NORMALS, generator=generator, dtype=torch.float64, device="cpu")
    first = next(iter(parameters.values()))
    factors, small = ((numbers.to(first)).repeat(2) for numbers in (1 + 0.1 * drawn.clamp(-3, 3), 0.1 * drawn))
    values = {}
    for number, (name, value) in enumerate(parameters.items()):
        place = number * _APART % _NORMALS  # no two parameters alike
        flat = value.detach().reshape(-1)
        scaled = _times(flat, factors[place : place + _NORMALS])
        if scaled.count_nonzero() < len(scaled):
            numbers = _times(torch.ones_like(flat), small[place : place + _NORMALS])
            scaled = torch.where(scaled == 0, numbers, scaled)
        other = torch.empty_like(value) if not value.is_contiguous() else None
        scaled = scaled.view(value.shape) if other is None else other.copy_(scaled.view(value.shape))
        values[name] = scaled.requires_grad_()
    return values


def _times(flat: Tensor, numbers: Tensor) -> Tensor:
    """Products with numbers that are repeated as often as it takes."""
    result = torch.empty_like(flat)
    whole = len(flat) // len(numbers) * len(numbers)
    if whole:
        torch.mul(flat[:whole].view(-1, len(numbers)), numbers, out=result[:whole].view(-1, len(numbers)))
    torch.mul(flat[whole:], numbers[: len(flat) - whole], out=result[whole:])
    return result


def copies(tensors: Mapping[int | str, Tensor]) -> dict[int | str, Tensor]:
    """What a model may overwrite."""
    return {key: tensor.clone() for key, tensor in tensors.items()}


def perturbed(
    three: Mapping[int | str, Tensor], sample: int, inputs: Inputs, generator: torch.Generator
) -> dict[int | str, Tensor]:
    """Copies, with other numbers in one sample: floats moved, integers drawn from the data, booleans exchanged.

    Args:
        three: Samples.
        sample: Which of them.
        inputs: The data.
        generator: Of the random numbers.

    Returns:
        The copies.
    """
    tensors = copies(three)
    for key, tensor in tensors.items():
        if tensor[sample].numel() == 0:
            continue
        if tensor.dtype == torch.bool:
            tensor[sample] = _another_row(tensor[sample], inputs.tensors[key], generator)
        elif tensor.is_floating_point() or tensor.is_complex():
            spread = torch.nan_to_num(three[key], 0, 0, 0).std() if tensor.numel() > 1 else tensor.new_ones(())
            noise = torch.randn(tensor[sample].shape, generator=generator, dtype=torch.float64, device="cpu").to(
                tensor.device
            )
            tensor[sample] = tensor[sample] + (0.5 * noise * (spread + 0.01)).to(tensor.dtype)
        else:
            seen = torch.unique(inputs.tensors[key][:1024])
            chosen = torch.randint(len(seen), tensor[sample].shape, generator=generator, device="cpu")
            drawn = seen.to(tensor.device)[chosen.to(tensor.device)]
            if torch.equal(drawn, tensor[sample]):
                drawn = _another_row(tensor[sample], inputs.tensors[key], generator)
            tensor[sample] = drawn
    return tensors


def _another_row(row: Tensor, data: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of the data that differs from this one; this one where there is none."""
    data = data[:1024].to(row.device)
    differing = (data != row).reshape(len(data), -1).any(1).nonzero()[:, 0]
    if not len(differing):
        return row
    return data[differing[int(torch.randint(len(differing), (), generator=generator, device="cpu"))]]
