"""Kernels as Gram matrices: scikit-learn's where it has them, and those that the theory of networks needs.

Matrices hold plain kernel values g(x, x'); dividing by K is `self_distill`'s part. scikit-learn's kernels take NumPy
arrays; the spline, arc-cosine and neural tangent kernels take CuPy arrays too.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import array_api_compat
import numpy as np

from sdfast.hilbert import _arrays

__all__ = ["KERNELS", "arc_cosine", "gram", "laplacian", "matern", "polynomial", "rbf", "relu_ntk", "spline"]


def gram(kernel: str | Callable[..., Any], x1: Any, x2: Any = None, **parameters: Any) -> Any:
    """The matrix g(x1_i, x2_j) of a kernel by name or by function.

    Args:
        kernel: A name of `KERNELS`; ``"precomputed"``, where x1 is the matrix itself; or a function of two arrays
            (n, features) and (m, features) that returns the (n, m) matrix.
        x1: (n, features).
        x2: (m, features); ``None`` for x1.
        **parameters: Of the kernel.

    Returns:
        (n, m).

    Raises:
        TypeError: The kernel does not take such a parameter, or is neither a name nor a function.
        ValueError: There is no kernel of that name, or a function returned another shape.
    """
    if isinstance(kernel, str) and kernel == "precomputed":
        if parameters or x2 is not None:
            raise TypeError("kernel: 'precomputed' takes a matrix alone")
        return _arrays.as_array("x1", x1)
    function = kernel if callable(kernel) else KERNELS.get(kernel) if isinstance(kernel, str) else None
    if function is None:
        raise ValueError(f"kernel: got {kernel!r}, wanted one of {', '.join(map(repr, KERNELS))}, or a function")
    if function in KERNELS.values():
        takes = list(inspect.signature(function).parameters)[2:]
        if unknown := [name for name in parameters if name not in takes]:
            wanted = ", ".join(takes) or "none"
            raise TypeError(f"{unknown[0]}: kernel {kernel!r} does not take it, wanted its parameters: {wanted}")
    x1, x2 = _both_points(x1, x2)
    matrix = _arrays.as_array("kernel", function(x1, x2, **parameters))
    if tuple(matrix.shape) != (x1.shape[0], x2.shape[0]):
        raise ValueError(
            f"kernel: returned shape {tuple(matrix.shape)}, wanted ({x1.shape[0]}, {x2.shape[0]}) for that many points"
        )
    return matrix


def _points(name: str, value: Any) -> Any:
    x = _arrays.as_array(name, value)
    if x.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted (points, features)")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wanted at least one feature")
    _arrays.check_finite(name, x)
    return x if _arrays.is_floating(x) else _arrays.namespace(x).astype(x, _arrays.namespace(x).float64)


def _both_points(x1: Any, x2: Any) -> tuple[Any, Any]:
    """x1 and x2, or x1 twice, with as many features."""
    x1 = _points("x1", x1)
    x2 = x1 if x2 is None else _points("x2", x2)
    if x1.shape[1] != x2.shape[1]:
        raise ValueError(f"x2: got {x2.shape[1]} features, wanted {x1.shape[1]} as x1")
    return x1, x2


def _numpy_only(name: str, *arrays: Any) -> None:
    if any(array_api_compat.is_cupy_array(x) for x in arrays if x is not None):
        raise NotImplementedError(f"kernel: {name!r} is scikit-learn's, for NumPy arrays: with CuPy pass a function")


def _positive(name: str, value: float) -> None:
    value = _arrays.check_number(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, wanted a finite number > 0")


def rbf(x1: Any, x2: Any = None, *, gamma: float | None = None) -> np.ndarray:
    """exp(−γ ‖x − x'‖²), γ = 1 / features where ``None`` (scikit-learn's ``rbf_kernel``)."""
    from sklearn.metrics.pairwise import rbf_kernel

    _numpy_only("rbf", x1, x2)
    return rbf_kernel(x1, x2, gamma=gamma)


def laplacian(x1: Any, x2: Any = None, *, gamma: float | None = None) -> np.ndarray:
    """exp(−γ ‖x − x'‖₁), γ = 1 / features where ``None`` (scikit-learn's ``laplacian_kernel``)."""
    from sklearn.metrics.pairwise import laplacian_kernel

    _numpy_only("laplacian", x1, x2)
    return laplacian_kernel(x1, x2, gamma=gamma)


def polynomial(
    x1: Any, x2: Any = None, *, degree: float = 3, gamma: float | None = None, coef0: float = 1
) -> np.ndarray:
    """(γ ⟨x, x'⟩ + coef0)^degree, γ = 1 / features where ``None`` (scikit-learn's ``polynomial_kernel``)."""
    from sklearn.metrics.pairwise import polynomial_kernel

    _numpy_only("polynomial", x1, x2)
    return polynomial_kernel(x1, x2, degree=degree, gamma=gamma, coef0=coef0)


def matern(x1: Any, x2: Any = None, *, length_scale: float = 1.0, nu: float = 1.5) -> np.ndarray:
    """Matérn's kernel of smoothness ν and that length scale (scikit-learn's ``Matern``)."""
    from sklearn.gaussian_process.kernels import Matern

    _numpy_only("matern", x1, x2)
    _positive("length_scale", length_scale)
    _positive("nu", nu)
    return Matern(length_scale=length_scale, nu=nu)(x1, x2)


def spline(x1: Any, x2: Any = None) -> Any:
    """Mobahi et al.'s example (§4): the Green's function of R(f) = ∫ f''² on [0, 1] with f = f'' = 0 at both ends.

    g(x, t) = max((x − t)³, 0) / 6 − x (1 − t)(x² − 2t + t²) / 6. It is zero where a point is 0 or 1: a label there
    cannot be fitted, and makes a path infeasible where it outweighs the tolerance.

    Args:
        x1: (n, 1), within [0, 1].
        x2: (m, 1); ``None`` for x1.

    Returns:
        (n, m).

    Raises:
        ValueError: A point has several features, or lies outside [0, 1].
    """
    x1, x2 = _both_points(x1, x2)
    xp = _arrays.namespace(x1)
    for name, x in (("x1", x1), ("x2", x2)):
        if x.shape[1] != 1:
            raise ValueError(f"{name}: got {x.shape[1]} features, wanted 1: the spline kernel is of one variable")
        if x.shape[0] and not (xp.all(x >= 0) and xp.all(x <= 1)):
            raise ValueError(f"{name}: got points from {float(xp.min(x))} to {float(xp.max(x))}, wanted within [0, 1]")
    x, t = x1, x2.T
    return xp.maximum(x - t, xp.zeros_like(x - t)) ** 3 / 6 - x * (1 - t) * (x * x - 2 * t + t * t) / 6


def arc_cosine(x1: Any, x2: Any = None, *, depth: int = 1, bias_variance: float = 0.0) -> Any:
    """The Gaussian process of an infinitely wide ReLU network with `depth` hidden layers (arc-cosine of order 1).

    Weights have variance 2 / fan-in (He), the input layer's 1 / features; Cho and Saul 2009. One hidden layer:
    ‖x‖ ‖x'‖ (√(1 − ρ²) + ρ(π − arccos ρ)) / (π · features), ρ the cosine.

    Args:
        x1: (n, features).
        x2: (m, features); ``None`` for x1.
        depth: Hidden layers.
        bias_variance: Of the biases of every layer.

    Returns:
        (n, m).
    """
    return _relu_network(x1, x2, depth, bias_variance)[0]


def relu_ntk(x1: Any, x2: Any = None, *, depth: int = 1, bias_variance: float = 0.0) -> Any:
    """The neural tangent kernel of the same network, all layers trained, per unit of width (Jacot et al. 2018).

    Θ⁰ = Σ⁰ and Θ^h = Σ^h + Θ^{h−1} (π − arccos ρ) / π, plus `bias_variance` for each layer's biases.

    Args:
        x1: (n, features).
        x2: (m, features); ``None`` for x1.
        depth: Hidden layers.
        bias_variance: Of the biases of every layer.

    Returns:
        (n, m).
    """
    return _relu_network(x1, x2, depth, bias_variance)[1]


def _relu_network(x1: Any, x2: Any, depth: int, bias_variance: float) -> tuple[Any, Any]:
    x1, x2 = _both_points(x1, x2)
    depth = _arrays.check_count("depth", depth)
    bias_variance = _arrays.check_number("bias_variance", bias_variance)
    if not (math.isfinite(bias_variance) and bias_variance >= 0):
        raise ValueError(f"bias_variance: got {bias_variance}, wanted a finite number >= 0")
    xp = _arrays.namespace(x1)
    features = x1.shape[1]
    covariance = x1 @ x2.T / features + bias_variance
    variances = [xp.sum(x * x, axis=1) / features + bias_variance for x in (x1, x2)]
    tangent = covariance
    for _ in range(depth):
        scale = xp.sqrt(variances[0])[:, None] * xp.sqrt(variances[1])[None, :]
        cosine = xp.clip(covariance / xp.where(scale > 0, scale, 1.0), -1.0, 1.0)
        obtuse = math.pi - xp.acos(cosine)
        covariance = scale * (xp.sqrt(1 - cosine * cosine) + cosine * obtuse) / math.pi + bias_variance
        tangent = covariance + tangent * obtuse / math.pi
        variances = [variance + bias_variance for variance in variances]  # 2 E[relu(u)²] = E[u²]
    return covariance, tangent


KERNELS: dict[str, Callable[..., Any]] = {
    "rbf": rbf,
    "laplacian": laplacian,
    "matern": matern,
    "polynomial": polynomial,
    "spline": spline,
    "arc_cosine": arc_cosine,
    "relu_ntk": relu_ntk,
}
