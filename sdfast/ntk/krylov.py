"""The top eigenpairs of a symmetric operator from a block Krylov space with full re-orthogonalisation.

Golub, Underwood 1977 (block Lanczos), Wu, Simon 2000 (thick restart), Stathopoulos, Wu 2002 (blocks made
orthonormal through their Gram matrix: CholeskyQR2 with an eigendecomposition in Cholesky's place, which reveals the
rank). The basis and all small matrices are float64, whatever the products are computed in. A converged pair stays in
the basis and is not multiplied again: it is locked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sdfast.ntk.operands import power_of_two

_SMALLEST = 2.0**-100
FRESH_BESIDE_START = 3  # of the first such look of a run that was given columns to begin with
FRESH = 8  # random columns of a look for eigenvectors that the block has missed
DEPTH = 3  # products that each random column takes part in before it counts as having seen the top
_SEEN = 3.0  # times the tolerance: a residual small enough for what a look has brought up
_SETTLED = 0.85  # times the tolerance: a start's residual that need not be followed
_CLOSE = 30.0  # times that: one that few products are likely to mend
_FLOOR = 0.05  # times the tolerance: a direction of the remainder so small is dropped, and noted
_ROUNDING = 4e-16  # of the remainder: a direction so small is nothing but rounding
_NEXT = 30.0  # the pair after the wanted ones is for the gap alone: this many times the tolerance will do


@dataclass
class Settings:
    """What a run is asked for.

    Attributes:
        wanted: Pairs.
        tolerance: On ‖Hv − λv‖ over the largest |λ|.
        block: Columns of the starting block.
        basis: Columns kept before a restart.
        products: Block products allowed.
    """

    wanted: int
    tolerance: float
    block: int
    basis: int
    products: int


@dataclass
class Outcome:
    """Pairs found.

    Attributes:
        values: Descending, one more than wanted unless there are no more.
        scale: The largest |λ|.
        vectors: (n, wanted) float64, orthonormal.
        products: Block products made.
        columns: Vectors multiplied.
        finished: Whether the iteration's own estimates meet the tolerance, and the look for missed ones is through.
    """

    values: np.ndarray
    scale: float
    vectors: Tensor
    products: int
    columns: int
    finished: bool


def block_size(wanted: int, points: int, device: torch.device) -> int:
    """Columns of a block: as many as one reading of H serves at no more cost, and no more than leave a margin of 3.

    Narrow blocks need fewer columns in all; what a block narrower than `wanted` may miss is looked for at the end.
    """
    widest = 32 if device.type == "cuda" else 16
    return min(points, widest, -(-(wanted + 3) // 8) * 8)


def basis_size(wanted: int, points: int) -> int:
    """Columns of the basis before a restart."""
    return min(points, max(160, 4 * wanted))


def top_pairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor | None,
    empty: Tensor,
    generator: torch.Generator,
    asked: Settings,
) -> Outcome:
    """The pairs with the largest eigenvalues.

    Args:
        product: (n, b) float64 to H times it, float64.
        start: (n, any) columns to begin with, beside random ones.
        empty: (n, 0) float64, on the device to work on.
        generator: Of the random columns.
        asked: What is asked for.

    Returns:
        The pairs, converged or not.
    """
    scaled = _Scaled(product)
    if start is not None:
        start = start[:, : asked.wanted + asked.block]
        # A wide start makes wide blocks, of which a few must fit between two restarts.
        fitting = asked.wanted + 1 + 4 * (start.shape[1] + FRESH)
        asked = replace(asked, basis=min(len(empty), max(asked.basis, fitting)))
    outcome = _Run(scaled, empty, generator, asked).solve(start)
    return replace(outcome, values=outcome.values * scaled.unit, scale=outcome.scale * scaled.unit)


class _Scaled:
    """Products with H over a power of two, which the first one shows: squares of its entries might not be numbers."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self.product, self.unit = product, 0.0

    def __call__(self, columns: Tensor) -> Tensor:
        if self.unit:
            before = min(max(self.unit, _SMALLEST), 1 / _SMALLEST)  # what float32 columns can be divided by
            return self.product(columns / before) / (self.unit / before)
        image = self.product(columns)
        self.unit = power_of_two(image.abs().amax().item() * len(image) ** 0.5) if image.numel() else 1.0
        return image / self.unit


class _Run:
    def __init__(self, product, empty: Tensor, generator: torch.Generator, asked: Settings) -> None:
        self.product = product
        self.empty = empty
        self.generator = generator
        self.asked = asked
        self.points = len(empty)
        self.basis = empty.new_empty(
            (min(self.points, asked.basis + asked.block + FRESH), self.points)
        ).mT  # columns together
        self.projected = np.zeros((self.basis.shape[1],) * 2)  # Qᵀ H Q
        self.size = 0
        self.values = np.zeros(0)
        self.rotation = np.zeros((0, 0))
        self.dropped = np.zeros((0, 0))  # of norm ‖dropped y‖: what H makes of the basis times y and nothing followed
        # Of the last look for missed eigenvectors: the share in it of what the basis times y is, ‖sought y‖² and all of
        # y beyond those columns.
        self.sought: np.ndarray | None = None

    @property
    def known(self) -> Tensor:
        """The basis so far (n, size)."""
        return self.basis[:, : self.size]

    def solve(self, start: Tensor | None) -> Outcome:
        asked, columns, checked = self.asked, 0, 0
        fresh = asked.block if start is None else 0
        block = self.orthonormal(self.random(fresh) if start is None else start)
        if not block.shape[1]:
            block = self.orthonormal(self.random(asked.block))
        # A block of more random columns than are wanted has a share in every copy of a repeated eigenvalue.
        seen = fresh > asked.wanted
        on_start = start is not None  # nothing else has been followed yet
        waiting, before = 0, None
        for count in range(1, asked.products + 1):
            remainder = self.extend(block, count == 1 and start is not None)
            columns, waiting = columns + block.shape[1], waiting - 1
            squares = _to_host(remainder.mT @ remainder)
            whole, last = self.size == self.points, count == asked.products
            full = self.room < block.shape[1] + FRESH and self.basis.shape[1] < self.points
            finished = settled = first = False
            if whole or last or full or on_start or self.size >= checked + self.pause:
                checked = self.size
                estimates = self.rayleigh_ritz(squares)
                resolved = waiting <= 0 and self.fresh_is_resolved(estimates)
                finished = whole or (resolved and self.meets(estimates))
                settled = on_start and self.meets_alone(estimates)
                # What a start misses is looked for at once, unless few products will do for the start itself.
                first = on_start and (settled or full or count > DEPTH or not self.meets_alone(estimates, _CLOSE))
            looking = (first or finished) and not (whole or seen or self.unchanged(before))
            if last or (finished and not looking):
                return self.outcome(count, columns, finished and not looking)
            if settled:
                self.settle(squares, estimates)
                remainder, squares = remainder[:, :0], squares[:0, :0]
            if looking:
                before, waiting, on_start = self.values[: asked.wanted].copy(), DEPTH, False
                self.sought = np.zeros((0, self.size))
            if full:
                checked = 0
            drawn = (FRESH_BESIDE_START if first else FRESH) if looking else 0
            block = self.next_block(remainder, squares, drawn, full and not settled)
        raise ValueError(f"max_iterations: got {asked.products}, wanted at least 1")

    @property
    def pause(self) -> int:
        """Columns to the next Rayleigh–Ritz: few while it costs little, then a fixed share."""
        return min(self.size**2 // 1024, self.size // 8)

    @property
    def room(self) -> int:
        """Columns that the basis can still take."""
        return self.basis.shape[1] - self.size

    def extend(self, block: Tensor, may_be_rounding: bool) -> Tensor:
        """Takes a block into the basis; what H makes of it outside the basis is returned."""
        first, last = self.size, self.size + block.shape[1]
        self.basis[:, first:last] = block
        self.size = last
        image = self.product(block)
        inside = self.known.mT @ image
        coefficients = _to_host(inside)
        check_projection(coefficients[first:], self.scale, may_be_rounding)
        self.projected[:last, first:last] = coefficients
        self.projected[first:last, :last] = coefficients.T
        return image.sub_(self.known @ inside)

    def rayleigh_ritz(self, squares: np.ndarray) -> np.ndarray:
        """Ritz pairs of the basis, and the residual norms of all of them.

        A residual is what leads out of the basis by the last block, and by what `next_block` and `settle` dropped.
        Wanted pairs of one eigenvalue, but for the tolerance, all have that of their worst mixture: rounding decides
        how the last Rayleigh–Ritz turns them among themselves.
        """
        small = self.projected[: self.size, : self.size]
        values, vectors = _eigh(small)
        self.values, self.rotation = values[::-1].copy(), vectors[:, ::-1].copy()
        ends = self.rotation[self.size - len(squares) :]
        dropped = self.dropped @ self.rotation[: self.dropped.shape[1]]
        norms = np.sqrt(np.maximum(np.einsum("ic,ic->c", ends, squares @ ends), 0)) + np.linalg.norm(dropped, axis=0)
        steps = -np.diff(self.values[: self.asked.wanted])
        apart = np.flatnonzero(steps > self.asked.tolerance * self.scale) + 1
        for alike in np.split(np.arange(len(steps) + 1), apart):
            if len(alike) > 1:
                worst = np.linalg.norm(ends[:, alike].T @ squares @ ends[:, alike], 2) ** 0.5
                norms[alike] = worst + np.linalg.norm(dropped[:, alike], 2)
        return norms

    @property
    def scale(self) -> float:
        """The largest |λ| seen."""
        return float(np.abs(self.values).max(initial=0.0))

    def meets(self, estimates: np.ndarray) -> bool:
        wanted = min(self.asked.wanted + 1, self.points)
        if len(estimates) < wanted:
            return False
        allowed = np.full(wanted, 0.95 * self.asked.tolerance)
        allowed[self.asked.wanted :] *= _NEXT
        return bool((estimates[:wanted] <= allowed * self.scale).all())

    def meets_alone(self, estimates: np.ndarray, times: float = 1.0) -> bool:
        """Whether the wanted pairs that there are would do, with a share left for what is yet to be followed."""
        return bool((estimates[: self.asked.wanted] <= _SETTLED * times * self.asked.tolerance * self.scale).all())

    def settle(self, squares: np.ndarray, estimates: np.ndarray) -> None:
        """Keeps the pairs of the start that will do, and drops what leads out of them: it need not be followed.

        Kept beside them, a direction that is followed no further would hold back every vector that has a share in it.
        """
        will_do = estimates <= _SETTLED * self.asked.tolerance * self.scale
        kept = self.rotation[:, will_do]
        ends = kept[self.size - len(squares) :]
        self.keep(kept, self.values[will_do])
        self.drop(*_eigh(ends.T @ squares @ ends))

    def drop(self, spectrum: np.ndarray, directions: np.ndarray) -> None:
        """Notes what is left out of H times the last columns of the basis: the eigenpairs of its Gram matrix."""
        rows = np.zeros((len(spectrum), self.size))
        rows[:, self.size - len(directions) :] = (directions * np.sqrt(np.maximum(spectrum, 0))).T
        before = np.pad(self.dropped, ((0, 0), (0, self.size - self.dropped.shape[1])))
        self.dropped = np.concatenate([before, rows])
        if len(self.dropped) > self.size:
            self.dropped = np.linalg.qr(self.dropped)[1]

    def fresh_is_resolved(self, estimates: np.ndarray) -> bool:
        """Whether the largest Ritz pair that lies mostly in what a look has brought up is known well enough.

        Its eigenvalue is within its residual norm of its Ritz value: that may not reach the wanted ones, but for the
        tolerance. Before, a copy of one of them might still be on its way up.
        """
        if self.sought is None:
            return True
        shares = self.shares(self.sought)
        largest = int(np.argmax(shares >= 0.5))
        if shares[largest] < 0.5:
            return True
        distance = self.values[min(self.asked.wanted, self.size) - 1] - self.values[largest]
        allowed = max(0.3 * distance, _SEEN * self.asked.tolerance * self.scale)
        return bool(estimates[largest] <= allowed)

    def shares(self, sought: np.ndarray) -> np.ndarray:
        """Of what the last look has brought up in each Ritz vector."""
        before = sought.shape[1]
        return np.square(sought @ self.rotation[:before]).sum(0) + np.square(self.rotation[before:]).sum(0)

    def unchanged(self, before: np.ndarray | None) -> bool:
        """Whether fresh random columns have brought up no eigenvalue that was missed."""
        if before is None or len(before) < self.asked.wanted:
            return False
        change = np.abs(self.values[: self.asked.wanted] - before).max()
        return bool(change <= 2 * self.asked.tolerance * self.scale)

    def next_block(self, remainder: Tensor, squares: np.ndarray, drawn: int, full: bool) -> Tensor:
        """The remainder's directions that matter, and random columns where asked for or nothing else is left."""
        block = self.directions(remainder, squares)
        if full:
            self.restart()
        if drawn or not block.shape[1]:
            block = torch.cat([block, self.random(drawn or FRESH)], 1)
        return self.orthonormal(block[:, : self.room])

    def directions(self, remainder: Tensor, squares: np.ndarray) -> Tensor:
        """Those of the remainder that matter, nearly orthonormal; the others are dropped."""
        found = remainder[:, :0]
        floor = (_FLOOR * self.asked.tolerance * self.scale) ** 2
        noise = _ROUNDING**2 * np.abs(squares).max(initial=0.0)
        while True:
            spectrum, turned = _eigh(squares)
            unclear = 1e-15 * len(spectrum) * spectrum.max(initial=0.0)  # what rounding of the squares hides
            kept = spectrum > max(floor, noise, unclear)
            block = remainder @ self.from_host(turned[:, kept] / np.sqrt(spectrum[kept]))
            found = torch.cat([found, block], 1)
            if kept.all() or unclear <= max(floor, noise) or not kept.any():
                self.drop(spectrum[~kept], turned[:, ~kept])
                return found
            for _ in range(2):
                remainder = remainder - found @ (found.mT @ remainder)
            squares = _to_host(remainder.mT @ remainder)

    def restart(self) -> None:
        """Keeps the best Ritz vectors: the remainder of the last block is orthogonal to all and couples them by H."""
        count = min(self.asked.wanted + 1 + (self.asked.basis - self.asked.wanted) // 3, self.size)
        kept = np.arange(self.size) < count
        if self.sought is not None:  # which may still be on their way up
            kept[np.flatnonzero(self.shares(self.sought) >= 0.5)[:FRESH]] = True
        self.keep(self.rotation[:, kept], self.values[kept])

    def keep(self, vectors: np.ndarray, values: np.ndarray) -> None:
        """Makes these Ritz vectors the basis."""
        count = len(values)
        self.dropped = self.dropped @ vectors[: self.dropped.shape[1]]
        if self.sought is not None:
            before = self.sought.shape[1]
            self.sought = np.linalg.qr(np.concatenate([self.sought @ vectors[:before], vectors[before:]]))[1]
        self.basis[:, :count] = self.known @ self.from_host(vectors)
        self.size = count
        self.projected[:] = 0
        np.fill_diagonal(self.projected[:count, :count], values)

    def orthonormal(self, block: Tensor) -> Tensor:
        """Columns orthonormal among themselves and to the basis; what is dependent is dropped."""
        for _ in range(5):
            before = _to_host(block.norm(dim=0))
            block = block - self.known @ (self.known.mT @ block)
            squares = _to_host(block.mT @ block)
            size = np.sqrt(np.diag(squares))
            cancelled = bool((size < 0.1 * before).any())  # its digits are lost, and with them what was orthogonal
            size[size == 0] = 1
            spectrum, directions = _eigh(squares / np.outer(size, size))
            kept = spectrum > 1e-13 * len(spectrum)
            block = block @ self.from_host((directions / size[:, None])[:, kept] / np.sqrt(spectrum[kept]))
            if not cancelled and kept.all() and spectrum.max(initial=1) <= 100 * spectrum.min(initial=1):
                break
        return block

    def random(self, columns: int) -> Tensor:
        shape = (self.points, min(columns, self.points - self.size))
        device = self.empty.device
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device=device)
        return drawn / self.points**0.5

    def from_host(self, matrix: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(self.empty.device)

    def outcome(self, products: int, columns: int, finished: bool) -> Outcome:
        wanted = self.asked.wanted
        vectors = self.known @ self.from_host(self.rotation[:, :wanted])
        if self.size < wanted:  # stopped before there were as many: any others, which are marked as not converged
            vectors = torch.cat([vectors, self.orthonormal(self.random(wanted - self.size))], 1)
        return Outcome(self.values[: wanted + 1], self.scale, vectors, products, columns, finished)


def check_projection(square: np.ndarray, scale: float, may_be_rounding: bool = False) -> None:
    """Refuses what Qᵀ H Q of one block Q shows not to be finite or symmetric.

    Args:
        square: Qᵀ H Q.
        scale: The largest |λ| seen so far.
        may_be_rounding: The block may lie where H is 0, and the products be nothing but rounding.

    Raises:
        ValueError: It is not.
    """
    if not np.isfinite(square).all():
        raise ValueError("gram: a product with it holds NaN or infinity, wanted finite numbers")
    asymmetry, scale = np.abs(square - square.T).max(initial=0.0), max(scale, np.abs(square).max(initial=0.0))
    if asymmetry > 1e-3 * scale and not may_be_rounding:
        raise ValueError(
            f"gram: is not symmetric: uᵀHv and vᵀHu differ by {asymmetry:.3g}, where H is of size {scale:.3g}"
        )


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the symmetric part. torch's, not NumPy's: their threads would wait for each other's cores."""
    values, vectors = torch.linalg.eigh(torch.from_numpy((matrix + matrix.T) / 2))
    return values.numpy(), vectors.numpy()


def _to_host(matrix: Tensor) -> np.ndarray:
    return matrix.cpu().numpy()
