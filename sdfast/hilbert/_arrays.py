"""NumPy and CuPy arrays through one namespace, and argument errors in one line."""

import math
import numbers
import operator
from collections.abc import Iterator
from typing import Any

import array_api_compat
import numpy as np

_CPU, _CUDA = 1, 2  # DLPack's device types
_BLOCK_ENTRIES = 2**18  # of a matrix, looked at together: so that looking makes no second matrix


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
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: got a masked array, wanted one without a mask: leave those points out")
    if not (type(value) is np.ndarray or array_api_compat.is_cupy_array(value)):
        shared = hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray)
        value = _from_dlpack(name, value) if shared else _from_sequence(name, value)
    if not (is_floating(value) or namespace(value).isdtype(value.dtype, ("bool", "integral"))):
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted real numbers")
    return value


def _from_dlpack(name: str, value: Any) -> Any:
    try:
        device_type = int(value.__dlpack_device__()[0])
        if device_type == _CPU:
            return np.from_dlpack(value)
        if device_type == _CUDA:
            import cupy

            return cupy.from_dlpack(value)
    except ImportError as error:
        raise TypeError(f"{name}: is on a GPU, and CuPy is not installed: pip install 'sdfast[cuda]'") from error
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise TypeError(f"{name}: a {type(value).__name__} that cannot be handed over: {message}") from error
    raise TypeError(f"{name}: is on a device of DLPack type {device_type}, wanted the CPU or an NVIDIA GPU")


def _from_sequence(name: str, value: Any) -> np.ndarray:
    try:
        found = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an array of numbers") from error
    if found.dtype == object:
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a dense array of numbers")
    return found


def namespace(array: Any) -> Any:
    """The array-API namespace of a NumPy or CuPy array."""
    return array_api_compat.array_namespace(array)


def is_floating(array: Any) -> bool:
    """Whether the dtype is a real floating one (NumPy's float16 too, which the array API does not know)."""
    return array.dtype.kind == "f"


def row_blocks(array: Any) -> Iterator[slice]:
    """Slices of rows, few enough that what is made of them is small beside a Gram matrix."""
    step = max(1, _BLOCK_ENTRIES // max(1, math.prod(array.shape[1:])))
    return (slice(start, start + step) for start in range(0, array.shape[0], step))


def check_finite(name: str, array: Any) -> None:
    """Refuses NaN and infinity, and names the first place where there is one."""
    xp = namespace(array)
    for rows in row_blocks(array):
        bad = ~xp.isfinite(array[rows])
        if xp.any(bad):
            place = np.argwhere(to_numpy(bad))[0]
            place[0] += rows.start
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
    largest, asymmetry = 0.0, 0.0
    for rows in row_blocks(gram):
        largest = max(largest, float(xp.max(xp.abs(gram[rows, :]))))
        asymmetry = max(asymmetry, float(xp.max(xp.abs(gram[rows, :] - gram[:, rows].T))))
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


def check_cross_gram(value: Any, like: Any) -> Any:
    """Kernel values between other points and the training points, (points, K) float64, beside an array with K rows."""
    cross = as_array("cross_gram", value)
    xp, points = namespace(like), like.shape[0]
    if namespace(cross) is not xp:
        raise TypeError(f"cross_gram: is a {type(cross).__module__} array, wanted one of {type(like).__module__}")
    if cross.ndim != 2 or cross.shape[1] != points:
        raise ValueError(f"cross_gram: got shape {tuple(cross.shape)}, wanted (points, {points})")
    return xp.astype(cross, xp.float64, copy=False)


def check_round(value: Any, fits: int) -> int:
    """A round as a count of fits, 1 to `fits`."""
    number = _integer("round", value)
    if not 1 <= number <= fits:
        raise ValueError(f"round: got {number}, wanted 1 (ordinary training) to {fits}, the fits of this path")
    return number


def check_count(name: str, value: Any, smallest: int = 1) -> int:
    """An integer of at least `smallest`."""
    number = _integer(name, value)
    if number < smallest:
        raise ValueError(f"{name}: got {number}, wanted at least {smallest}")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")


def check_number(name: str, value: Any) -> float:
    """A real number, as a float; its size is the caller's to judge."""
    scalar = value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(scalar, bool | np.bool_) or not isinstance(scalar, numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    return float(scalar)


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, wanted True or False")
    return bool(value)


def to_numpy(array: Any) -> np.ndarray:
    """The array on the CPU."""
    return array.get() if array_api_compat.is_cupy_array(array) else np.asarray(array)
