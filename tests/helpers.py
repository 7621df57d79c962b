"""What the tests of several operations share: tolerances, awkward layouts, poisoned memory."""

import os

import pytest
import torch

from sdfast import _dispatch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton serves the CPU, and no GPU


def backends(without=()):
    """The backends beside the reference to put under ``parametrize("backend", ...)``.

    Those of a GPU are always among them: conftest marks such tests ``cuda``, and lets their tensors be made there.
    """
    names = ("cpu", "triton") if INTERPRETED else ("cpu", "cuda", "triton")
    found = [name for name in names if name not in without]
    return [name for name in found if name != "cpu" or _dispatch.why_not("cpu", "cpu") is None]


# A test of the Triton backend alone: in the interpreter's process, or on a GPU.
of_triton = pytest.mark.parametrize("backend", ["triton"])


def device_of(backend):
    """Where the tensors of a test of this backend are."""
    return "cuda" if backend in ("cuda", "triton") and not INTERPRETED else "cpu"


def random_numbers(seed):
    """A generator for wherever tensors are made now."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def assert_as_good_as_torch(name, got, torch_result, exact, unit=1.0, stored=0.0):
    """The error against float64 is at most twice that of torch in the same dtype, plus rounding of the natural scale.

    `torch_result` is the reference run in the tested dtype, `exact` the same in float64, `unit` the size below which
    a difference is rounding (where the exact result happens to be zero), `stored` what a store may lose of the result.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    assert got.dtype == torch_result.dtype, f"{name}: dtype {got.dtype}, wanted {torch_result.dtype}"
    got_is_double = got.dtype == torch.float64
    epsilon = torch.finfo(torch.float64 if got_is_double else torch.float32).eps
    got, torch_result, exact = (t.detach().double() for t in (got, torch_result, exact))
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(got), special(exact)), f"{name}: {special.__name__} differs: {got} against {exact}"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    error = (got - exact)[finite].abs().max().item()
    torch_error = (torch_result - exact)[finite].abs().max().item()
    scale = max(unit, exact[finite].abs().max().item())
    # float64 is judged against itself: there the reference's own rounding, which grows with the row, is in the floor.
    allowed = 2 * torch_error + (128 if got_is_double else 4) * epsilon * scale
    allowed += stored * exact[finite].abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, torch's own {torch_error:.3g}, allowed {allowed:.3g}"


def poison(like):
    """Leaves NaN in the memory that the allocator is likely to hand out next for a tensor of this size."""
    blocks = [torch.full_like(like, torch.nan, memory_format=torch.contiguous_format) for _ in range(3)]
    del blocks


def awkward(tensor, layout):
    """The same values in another memory layout."""
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        wide = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1] + 1), torch.nan)
        wide[:, 1::2] = tensor
        return wide[:, 1::2]
    if layout == "misaligned":
        flat = tensor.new_full((tensor.numel() + 1,), torch.nan)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(tensor.shape)
    if layout == "padded":
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3), torch.nan)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]
    raise ValueError(f"layout: got {layout!r}")


def interpreted(backend):
    """Whether the backend runs in Triton's interpreter, where every tile takes milliseconds."""
    return backend == "triton" and INTERPRETED


def lost_in_store(backend, dtype):
    """Triton's interpreter truncates what it stores in bfloat16, where a GPU rounds."""
    return 2.0**-7 if interpreted(backend) and dtype == torch.bfloat16 else 0.0


def skip_what_takes_the_interpreter_minutes(backend, long):
    """Skips a case of many tiles or launches that others of its test stand for."""
    if long and interpreted(backend):
        pytest.skip("takes Triton's interpreter minutes; smaller cases of this test run")


LAYOUTS = ("contiguous", "transposed", "strided", "misaligned", "padded")
