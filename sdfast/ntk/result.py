"""The matrix that is filled: its shape for every form, its tiles, its mirror image, its place in memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdfast import _checks
from sdfast.ntk.outputs import Outputs

LEAST_ROWS = 1024  # of a tile: smaller products are slower
LEAST_OF_BLOCKS = 512  # where a tile is one for each output, or pair of them, and all of them in float64


class Result:
    """H, filled tile by tile.

    Args:
        outputs: Form and number of outputs.
        rows: Samples of the rows.
        columns: Samples of the columns.
        precision: Of the products, which decides the dtype.
        device: Of the model.
        symmetric: Only tiles of the lower triangle are filled, and mirrored at the end.
        out: The user's tensor or array, or ``None``.

    Raises:
        TypeError: `out` has another type or dtype than the result.
        ValueError: It has another shape or cannot be written.
        MemoryError: There is no room for the result.
    """

    def __init__(
        self,
        outputs: Outputs,
        rows: int,
        columns: int,
        precision: str,
        device: torch.device,
        symmetric: bool,
        out: Tensor | np.ndarray | None,
    ) -> None:
        self.outputs, self.rows, self.columns, self.symmetric = outputs, rows, columns, symmetric
        self.shape = outputs.shape(rows, columns)
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.array = out
        self.tensor = _allocated(self.shape, dtype, device) if out is None else _given(out, self.shape, dtype)
        # (..., rows, columns) for every form
        self.matrix = self.tensor.permute(2, 3, 0, 1) if outputs.form == "full" else self.tensor
        self.clear()

    def clear(self) -> None:
        """Zeros, to begin with."""
        self.tensor.zero_()

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tiles to fill."""
        return tiles_of(self.rows, self.columns, self.symmetric, self.outputs.form)

    def add(self, rows: slice, columns: slice, tile: Tensor) -> None:
        """Adds a float64 tile (..., rows, columns)."""
        place = self.matrix[..., rows, columns]
        place.copy_(place + tile.to(place.device))

    def finished(self) -> Tensor:
        """The result: scaled where the mean is asked for, mirrored, written out."""
        if self.outputs.form == "mean":
            self.tensor /= self.outputs.classes
        if self.symmetric:
            for rows, columns in self.tiles():
                self._mirror(rows, columns)
        if isinstance(self.array, np.memmap):
            self.array.flush()
        return self.tensor

    def _mirror(self, rows: slice, columns: slice) -> None:
        tile = self.matrix[..., rows, columns]
        full = self.outputs.form == "full"
        if rows != columns:
            mirrored = tile.transpose(0, 1) if full else tile
            self.matrix[..., columns, rows] = mirrored.mT
            return
        if full:  # (c, c', i, j) as a matrix of (c, i) × (c', j)
            classes, size = self.outputs.classes, tile.shape[-1]
            square = tile.permute(0, 2, 1, 3).reshape(classes * size, classes * size)
            lower = square.tril() + square.tril(-1).mT
            tile.copy_(lower.reshape(classes, size, classes, size).permute(0, 2, 1, 3))
        else:
            tile.copy_(tile.tril() + tile.tril(-1).mT)


def tiles_of(rows: int, columns: int, symmetric: bool, form: str) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every tile of a matrix of this form, of a symmetric one on and below the diagonal."""
    least = LEAST_OF_BLOCKS if form in ("full", "per_class") else LEAST_ROWS
    size = min(2048, max(least, -(-max(rows, columns) // 4)))
    for top in range(0, rows, size):
        end = min(top + size, rows)
        for left in range(0, top + 1 if symmetric else columns, size):
            yield slice(top, end), slice(left, min(left + size, columns))


def _given(out: Tensor | np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise ValueError("out: got an array that cannot be written, wanted one opened for writing")
        if out.dtype not in (np.float32, np.float64):
            raise TypeError(f"out: got {out.dtype}, wanted {str(dtype).removeprefix('torch.')}")
        out = torch.from_numpy(out)
    _checks.check_tensor("out", out)
    if out.requires_grad:
        raise ValueError("out: requires grad, which a result that is written in place cannot; pass out.detach()")
    if out.dtype != dtype:
        raise TypeError(f"out: got {_checks.dtype_name(out)}, wanted {str(dtype).removeprefix('torch.')}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out: got shape {_checks.shape_text(out)}, wanted {shape}")
    return out


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = dtype.itemsize
    for length in shape:
        size *= length
    free = _free_memory(device)
    if free is not None and size > free:
        raise MemoryError(
            f"H: a result of shape {shape} takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; pass out= "
            "with a memory map (numpy.lib.format.open_memmap), ask for fewer outputs, or take fewer samples"
        )
    return torch.empty(shape, dtype=dtype, device=device)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be had, or ``None`` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
