"""Warnings that point at the user's line."""

import sys
import warnings


def warn_caller(message: str) -> None:
    """Warns at the first line outside this package, and outside torch's way of calling a module."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("sdfast.", "torch.nn.modules.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
