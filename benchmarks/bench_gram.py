"""Products of gradients added to a Gram matrix (float32 operands, float64 total): rows, and factors of linear layers.

Each implementation is checked against the float64 definition before it is timed. Peers: torch's product of the whole
square, promoted; and both products with their Hadamard product, layer by layer.

Then Gram matrices of whole networks (of the sum of the outputs), the first columns of which are checked against vjp and
jvp in float64. The floor is one eager forward and backward at its best micro-batch, and the counted FLOPs of the lower
triangle by torch's GEMM. Peers: torch.func's contraction at its best chunk, module hooks with an unfolded input, and
nngeometry where it is installed and knows the layers; where a peer would take minutes a share of the matrix is timed
and named so. "predicted" is what ``sdfast.ntk.plan(calibrate=True)`` said beforehand. How a model uses its parameters
`gram` finds out at the first call, which is a row too, and only confirms at the next. Other precisions are rows beside.

On a GPU, and in a dry run, whole networks up to 50,000 samples by precision, against torch.func where it takes no
minutes: before a row is timed its first corner of at most 512 samples is compared with the float64 kernel, and its
error recorded.
"""

import copy
import functools
import importlib.util

import pytest
import torch

from benchmarks import networks
from benchmarks.harness import DEVICE, TURNS, Case, interleaved, measure, peak_bytes
from benchmarks.shapes import ON_GPU, TINY, sized
from sdfast import ntk
from sdfast.ntk.verified import forget
from sdfast.ops.gram import PRECISIONS, add_gram, add_hadamard_gram
from sdfast.ops.gram.reference import hadamard_reference, product_reference

ROUNDED = ("bf16x3", "tf32", "bf16")
PEERS = {"torch": "torch:", "floor": "floor:", "a share of torch": "share:", "nngeometry": "nngeometry"}
ROWS_OF = {"rows n=128": (128, 65536), "rows n=1000": (1000, 16384)}  # columns as a panel has them
LAYERS_OF = {"MLP n=1000": (1000, ((784, 2048), (2048, 2048), (2048, 10)))}
if ON_GPU:
    ROWS_OF["rows n=8192"] = (8192, 16384)
    LAYERS_OF["MLP n=8192"] = (8192, LAYERS_OF["MLP n=1000"][1])
if TINY:
    ROWS_OF = {group: sized(*sizes) for group, sizes in ROWS_OF.items()}
    LAYERS_OF = {group: (*sized(n), tuple(sized(*pair) for pair in pairs)) for group, (n, pairs) in LAYERS_OF.items()}
GROUPS = (*ROWS_OF, *LAYERS_OF)
TARGETS = {group: {"sdfast": (None,) * 4} for group in GROUPS}
TARGETS["ResNet-20 n=128"] = {"sdfast": (1 / 1.4, 1.3, None, None)}
TARGETS["ResNet-20 n=1000"] = {"sdfast": (1 / 1.8, 1.1, None, None)}
# The whole takes torch.func the gradients of 3,760 samples, block by block of 4 GiB; the share 125, thirty times fewer.
TARGETS["MLP 784-2048-2048-10 n=1000"] = {"sdfast": (None, 1.3, 30 / 50, None)}
TARGETS["ViT-tiny n=128"] = TARGETS["GPT block T=64 n=64"] = {"sdfast": (None,) * 4}
FIRST = "sdfast, first call"
for _group in networks.NETWORKS:
    TARGETS[_group][FIRST] = TARGETS[_group]["sdfast"]
for _group in ("ResNet-20 n=128", "MLP 784-2048-2048-10 n=1000"):
    TARGETS[_group] |= {f"sdfast {name}": (None,) * 4 for name in ROUNDED}
NAMES = ("torch: whole square", "sdfast")
# Relative errors of H that a row may have.
TOLERANCE = {"bf16": 5e-2, "tf32": 5e-3}

CONTRACTION, HOOKS = "torch: torch.func contraction", "torch: hooks and unfold"
FLOOR = "floor: forward, backward and products"
VECTORS = "share: NTK-vector products, 2 columns"
SHARE = "share: torch.func contraction, 1/64 of H"
NETWORK_NAMES = {
    "ResNet-20 n=128": (FLOOR, CONTRACTION, HOOKS, VECTORS, "sdfast", FIRST, *(f"sdfast {name}" for name in ROUNDED)),
    "GPT block T=64 n=64": (FLOOR, CONTRACTION, HOOKS, VECTORS, "sdfast", FIRST),
    "MLP 784-2048-2048-10 n=1000": (FLOOR, SHARE, "sdfast", FIRST, *(f"sdfast {name}" for name in ROUNDED)),
    "ViT-tiny n=128": (FLOOR, CONTRACTION, HOOKS, "sdfast", FIRST),
    "ResNet-20 n=1000": (FLOOR, CONTRACTION, "sdfast", FIRST),
}
if importlib.util.find_spec("nngeometry"):  # it knows these networks' layers; of the sum of the outputs, in one batch
    for _group in ("ResNet-20 n=128", "MLP 784-2048-2048-10 n=1000"):
        NETWORK_NAMES[_group] = (*NETWORK_NAMES[_group], "nngeometry")
if ON_GPU:
    NETWORK_NAMES = {}
COLUMNS = 2


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


@functools.lru_cache(maxsize=1)
def network(group):
    """Model, samples, the exact columns of H and the plan."""
    torch.manual_seed(0)
    model, x = networks.NETWORKS[group]()
    double = x.double() if x.is_floating_point() else x
    columns = networks.products(copy.deepcopy(model).double(), double, COLUMNS)
    return model, x, columns, ntk.plan(model, x, outputs="sum", calibrate=True)


def precision_of(name):
    """That a row names; float32 where it names none."""
    last = name.split()[-1]
    return last if last in PRECISIONS else "float32"


def steps_of(group, name):
    """A row of a whole network: what is timed."""
    model, x, _, plan = network(group)
    flops = sum(entry.product_flops for entry in plan.entries)
    if name.startswith("sdfast"):
        gram = functools.partial(ntk.gram, model, x, outputs="sum", precision=precision_of(name))
        return gram if name != FIRST else lambda: (forget(model), gram())[1]
    if name == FLOOR:
        batch = networks.fastest_of((32, 64, 128, 256), lambda size: networks.plain_pass(model, x[:256], size))

        def floor():
            networks.plain_pass(model, x, batch)
            networks.multiply(flops)

        return floor
    if name == "nngeometry":
        return functools.partial(networks.nngeometry_gram, copy.deepcopy(model), x)
    if name == HOOKS:
        return functools.partial(networks.Hooks(copy.deepcopy(model)).gram, x)
    if name == VECTORS:
        return lambda: networks.products(model, x, COLUMNS)
    chunk = networks.fastest_of((16, 32, 64), lambda size: networks.contraction(model, x[:64], size))
    few = x[: len(x) // 8] if name == SHARE else x
    return lambda: networks.contraction(model, few, chunk)


def prepare_network(group, name):
    """A row's step, checked by the very run whose memory is measured."""
    _, _, columns, plan = network(group)
    step = steps_of(group, name)
    results = []
    peak = peak_bytes(lambda: results.append(step()))
    if name != FLOOR:
        got = results[0][:, :COLUMNS].double()
        wanted = columns[: len(got)]
        if not (got - wanted).norm() <= TOLERANCE.get(precision_of(name), 1e-4) * wanted.norm():
            raise SystemExit(f"bench_gram: {name} is wrong at {group}")
    about = {"peak_bytes": peak}
    if name == "sdfast":
        about["predicted_seconds"] = plan.seconds.total
    return Case(step, floor_flops=plan.flops if name == "sdfast" else 0, rounds=1, about=about)


NETWORK_CASES = [
    pytest.param(group, turn, name, id=f"{group} {name} #{turn}")
    for group, names in NETWORK_NAMES.items()
    for turn in range(TURNS)  # every row of a group in one turn before any in the next
    for name in names
]


@pytest.mark.parametrize(("group", "turn", "name"), NETWORK_CASES)
def test_network(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_network)


# group -> network, samples, whether torch.func takes minutes
KERNELS = {}
if TINY:
    KERNELS = {
        "ResNet-8 n=6": ("resnet8", 6, False),
        "ResNet-8 n=9": ("resnet8", 9, True),
        "MLP n=9": ("mlp", 9, False),
    }
elif ON_GPU:
    KERNELS = {
        "ResNet-56 n=128": ("resnet56", 128, False), "ResNet-56 n=1000": ("resnet56", 1000, False),
        "ResNet-56 n=8192": ("resnet56", 8192, True), "MLP kernel n=8192": ("mlp", 8192, True),
        "ResNet-56 n=50000": ("resnet56", 50_000, True),
    }  # fmt: skip
TARGETS |= {group: {f"sdfast {name}": (None,) * 4 for name in ("float32", *ROUNDED)} for group in KERNELS}
if "ResNet-56 n=1000" in KERNELS:
    TARGETS["ResNet-56 n=1000"] |= {"sdfast float32": (1 / 4, *[None] * 3), "sdfast bf16": (1 / 10, *[None] * 3)}
KERNEL_NAMES = (*(f"sdfast {name}" for name in ("float32", *ROUNDED)), CONTRACTION)
CORNER = 512


@functools.lru_cache(maxsize=1)
def kernel(group):
    """Model, samples and the kernel of the first of them in float64."""
    name, n, _ = KERNELS[group]
    torch.manual_seed(0)
    model, x = networks.trained_a_little(name, n)
    double = copy.deepcopy(model).double()
    return model, x, ntk.gram(double, x[:CORNER].double(), outputs="sum", precision="float64")


def prepare_kernel(group, name):
    """A row's step, its corner compared."""
    model, x, exact = kernel(group)
    if name == CONTRACTION:
        if KERNELS[group][2]:
            pytest.skip("torch.func takes minutes, or more memory than there is")
        step = functools.partial(networks.contraction, model, x, 64)
        got = networks.contraction(model, x[:CORNER], 64)
    else:
        step = functools.partial(ntk.gram, model, x, outputs="sum", precision=precision_of(name))
        got = ntk.gram(model, x[:CORNER], outputs="sum", precision=precision_of(name))
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE.get(precision_of(name), 1e-4):
        raise SystemExit(f"bench_gram: {name} is wrong at {group}: {error:.3g}")
    about = {"dtype": "bfloat16" if precision_of(name).startswith("bf16") else "float32", "corner_error": error}
    if DEVICE.type == "cuda" and len(x) > 10_000:
        about["peak_bytes"] = 0  # measured by the timed run: a step more would take a minute
        torch.cuda.reset_peak_memory_stats()
    return Case(step, floor_flops=networks.floor_flops(model, x), rounds=1, about=about)


@interleaved(KERNELS, KERNEL_NAMES, 1)
def test_kernel(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare_kernel)
    if DEVICE.type == "cuda" and benchmark.extra_info["peak_bytes"] == 0:
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
