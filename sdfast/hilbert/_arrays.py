"""NumPy and CuPy arrays through one namespace, and argument errors in one line."""

import operator
from typing import Any

import array_api_compat
import numpy as np

_CPU, _CUDA = 1, 2  # DLPack's device types
_BLOCK = 1024  # rows looked at together, so that checking a Gram matrix makes no second one


def as_array(name: str, value: Any) -> Any:
    """The value as a NumPy or CuPy array, without a copy where there need be none.

    Args:
        name: Of the argument, for errors.
        value: A NumPy or CuPy array, anything with ``__dlpack__`` (a torch tensor), or what NumPy makes an array of.

    Returns:
        The array, on the device where the values are.

    Raises:
        TypeError: The values are not real numbers, or cannot be handed over.
    """
    if not (array_api_compat.is_numpy_array(value) or array_api_compat.is_cupy_array(value)):
        value = _from_dlpack(name, value) if hasattr(value, "__dlpack__") else _from_sequence(name, value)
    if not (is_floating(value) or namespace(value).isdtype(value.dtype, ("bool", "integral"))):
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted real numbers")
    return value


def _from_dlpack(name: str, value: Any) -> Any:
    device_type = int(value.__dlpack_device__()[0])
    try:
        if device_type == _CPU:
            return np.from_dlpack(value)
        if device_type == _CUDA:
            import cupy

            return cupy.from_dlpack(value)
    except ImportError as error:
        raise TypeError(f"{name}: is on a GPU, and CuPy is not installed: pip install 'sdfast[cuda]'") from error
    except (BufferError, RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise TypeError(f"{name}: a {type(value).__name__} that cannot be handed over: {message}") from error
    raise TypeError(f"{name}: is on a device of DLPack type {device_type}, wanted the CPU or an NVIDIA GPU")


def _from_sequence(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:  # a ragged list
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an array of numbers") from error


def namespace(array: Any) -> Any:
    """The array-API namespace of a NumPy or CuPy array."""
    return array_api_compat.array_namespace(array)


def is_floating(array: Any) -> bool:
    """Whether the dtype is a real floating one (NumPy's float16 too, which the array API does not know)."""
    return array.dtype.kind == "f"


def check_finite(name: str, array: Any) -> None:
    """Refuses NaN and infinity, and names the first place where there is one."""
    xp = namespace(array)
    for start in range(0, array.shape[0], _BLOCK):
        bad = ~xp.isfinite(array[start : start + _BLOCK])
        if xp.any(bad):
            place = np.argwhere(to_numpy(bad))[0]
            place[0] += start
            value = float(array[tuple(place)])
            raise ValueError(f"{name}: entry {tuple(map(int, place))} is {value}, wanted finite numbers")


def check_gram(value: Any) -> Any:
    """A Gram matrix as a square, finite, symmetric array of at least float32."""
    gram = as_array("gram", value)
    xp = namespace(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram: got shape {tuple(gram.shape)}, wanted a square (points, points) matrix")
    if gram.shape[0] == 0:
        raise ValueError("gram: got shape (0, 0), wanted at least one point")
    if not is_floating(gram) or gram.dtype.itemsize < 4:
        gram = xp.astype(gram, xp.float64 if not is_floating(gram) else xp.float32)
    check_finite("gram", gram)
    points = gram.shape[0]
    largest, asymmetry = 0.0, 0.0
    for start in range(0, points, _BLOCK):
        rows = gram[start : start + _BLOCK, :]
        largest = max(largest, float(xp.max(xp.abs(rows))))
        asymmetry = max(asymmetry, float(xp.max(xp.abs(rows - gram[:, start : start + _BLOCK].T))))
    allowed = 100 * float(xp.finfo(gram.dtype).eps) * largest
    if asymmetry > allowed:
        raise ValueError(
            f"gram: differs from its transpose by up to {asymmetry:.3g} (rounding would explain {allowed:.3g}), "
            "wanted a symmetric matrix"
        )
    return gram


def check_targets(value: Any, gram: Any) -> tuple[Any, bool]:
    """Labels y as a float64 (points, outputs) array beside the Gram matrix, and whether they came as one vector."""
    y = as_array("y", value)
    xp = namespace(gram)
    if namespace(y) is not xp:
        raise TypeError(f"y: is a {type(y).__module__} array, wanted one of {type(gram).__module__} like gram")
    points = gram.shape[0]
    if y.ndim not in (1, 2) or y.shape[0] != points or (y.ndim == 2 and y.shape[1] == 0):
        raise ValueError(
            f"y: got shape {tuple(y.shape)}, wanted ({points},) or ({points}, outputs) for gram {tuple(gram.shape)}"
        )
    if not is_floating(y):
        raise TypeError(
            f"y: got {y.dtype}, wanted floats; class labels become one-hot rows, less their mean, first "
            "(KernelSelfDistillationClassifier takes them as they are)"
        )
    check_finite("y", y)
    columns = xp.astype(y if y.ndim == 2 else y[:, None], xp.float64)
    if points > 1 and bool(xp.all(columns == columns[:1, :])):
        raise ValueError(
            "y: every point has the same label, so there is nothing to distil (the estimators take it, and predict it)"
        )
    return columns, y.ndim == 1


def check_round(value: Any, fits: int) -> int:
    """A round as a count of fits, 1 to `fits`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"round: got {type(value).__name__}, wanted an integer") from error
    if not 1 <= number <= fits:
        raise ValueError(f"round: got {number}, wanted 1 (ordinary training) to {fits}, the fits of this path")
    return number


def check_count(name: str, value: Any, smallest: int = 1) -> int:
    """An integer of at least `smallest`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if operator.index(value) < smallest:
        raise ValueError(f"{name}: got {value}, wanted at least {smallest}")
    return operator.index(value)


def to_numpy(array: Any) -> np.ndarray:
    """The array on the CPU."""
    return array.get() if array_api_compat.is_cupy_array(array) else np.asarray(array)
