"""Products of gradients added to a Gram matrix (float32 operands, float64 total): rows, and factors of linear layers.

Each implementation is checked against the float64 definition before it is timed. Peers: torch's product of the whole
square, promoted; and both products with their Hadamard product, layer by layer.
"""

import functools

import torch

from benchmarks.harness import Case, interleaved, measure
from benchmarks.shapes import ON_GPU, TINY, sized
from sdfast.ops.gram import add_gram, add_hadamard_gram
from sdfast.ops.gram.reference import hadamard_reference, product_reference

PEERS = {"torch": "torch:"}
ROWS_OF = {"rows n=128": (128, 65536), "rows n=1000": (1000, 16384)}  # columns as a panel has them
LAYERS_OF = {"MLP n=1000": (1000, ((784, 2048), (2048, 2048), (2048, 10)))}
if ON_GPU:
    ROWS_OF["rows n=8192"] = (8192, 16384)
    LAYERS_OF["MLP n=8192"] = (8192, LAYERS_OF["MLP n=1000"][1])
if TINY:
    ROWS_OF = {group: sized(*sizes) for group, sizes in ROWS_OF.items()}
    LAYERS_OF = {
        group: (*sized(n), tuple(map(lambda pair: sized(*pair), pairs))) for group, (n, pairs) in LAYERS_OF.items()
    }
GROUPS = (*ROWS_OF, *LAYERS_OF)
TARGETS = {group: {"sdfast": (None,)} for group in GROUPS}
NAMES = ("torch: whole square", "sdfast")


@functools.lru_cache(maxsize=1)
def inputs(group):
    """Operands of a group and the exact result."""
    if group in ROWS_OF:
        rows = torch.randn(*ROWS_OF[group])
        return rows, product_reference(rows, rows, "float32").tril()
    n, layers = LAYERS_OF[group]
    sides = tuple(torch.randn(n, sum(layer[place] for layer in layers)) for place in (0, 1))
    return sides, hadamard_reference(sides, sides, layers, "float32").tril()


def whole_square(group, total):
    """What one writes in torch."""
    operands, _ = inputs(group)
    if group in ROWS_OF:
        for chunk in operands.split(4096, 1):
            total += chunk @ chunk.T
        return total
    a = b = 0
    for width, outputs in LAYERS_OF[group][1]:
        left, right = operands[0][:, a : a + width], operands[1][:, b : b + outputs]
        total += (left @ left.T) * (right @ right.T)
        a, b = a + width, b + outputs
    return total


def triangle(group, total):
    """The operation."""
    operands, _ = inputs(group)
    if group in ROWS_OF:
        return add_gram(total, operands)
    return add_hadamard_gram(total, operands, splits=LAYERS_OF[group][1])


def prepare(group, name):
    """A row's step, checked."""
    function = triangle if name == "sdfast" else whole_square
    _, exact = inputs(group)
    got = function(group, torch.zeros_like(exact)).tril()
    if (got - exact).norm() > 1e-5 * exact.norm():
        raise SystemExit(f"bench_gram: {name} is wrong at {group}")
    n = len(exact)
    width = ROWS_OF[group][1] if group in ROWS_OF else sum(map(sum, LAYERS_OF[group][1]))
    total = torch.zeros_like(exact)
    return Case(lambda: function(group, total), floor_flops=n * n * width, floor_bytes=4 * n * width)


@interleaved(GROUPS, NAMES)
def test_gram(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
