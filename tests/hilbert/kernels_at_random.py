"""Gram matrices and labels drawn at random, for tests that must hold on every kernel."""

import numpy as np


def random_problem(rng, points=None, outputs=None, decades=None):
    """A Gram matrix of random spectrum and size, and labels."""
    points = points or int(rng.integers(2, 13))
    decades = rng.uniform(0, 6) if decades is None else decades
    spectrum = 10 ** -rng.uniform(0, decades, points)
    vectors, _ = np.linalg.qr(rng.normal(size=(points, points)))
    gram = (vectors * spectrum) @ vectors.T
    shape = points if outputs is None else (points, outputs)
    return (gram + gram.T) / 2 * points, rng.normal(size=shape) * rng.choice([1e-3, 1, 50])
