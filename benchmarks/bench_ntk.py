"""The tangent kernel of whole networks: `sdfast.ntk.gram` by precision, against torch.func; and the probe of training.

The floor: one forward and backward pass over the samples, as torch counts its FLOPs, and the triangle of n² p, at the
measured rate of a matrix product. Before it is timed, each row's first corner of at most 512 samples is compared with
the float64 kernel, and its error recorded.
"""

import copy
import functools

import pytest
import torch
from torch.func import functional_call, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

import sdfast
from benchmarks.harness import DEVICE, Case, interleaved, measure
from benchmarks.shapes import ON_GPU, TINY, sized
from sdfast.train import InformationProbe

PEERS = {"torch.func": "torch.func", "float32": "sdfast float32"}
PRECISIONS = ("float32", "bf16x3", "tf32", "bf16")
CORNER = 512
# group -> network, samples, whether torch.func takes minutes
if TINY:
    GROUPS = {"ResNet-8 n=6": ("resnet8", 6, False), "ResNet-8 n=9": ("resnet8", 9, True), "MLP n=9": ("mlp", 9, False)}
elif ON_GPU:
    GROUPS = {
        "ResNet-56 n=128": ("resnet56", 128, False), "ResNet-56 n=1000": ("resnet56", 1000, False),
        "ResNet-56 n=8192": ("resnet56", 8192, True), "MLP n=8192": ("mlp", 8192, True),
        "ResNet-56 n=50000": ("resnet56", 50_000, True),
    }  # fmt: skip
else:
    GROUPS = {"ResNet-20 n=128": ("resnet20", 128, False), "MLP n=1000": ("mlp", 1000, False)}
TARGETS = {group: {f"sdfast {name}": (None, None) for name in PRECISIONS} for group in GROUPS}
if ON_GPU and not TINY:
    TARGETS["ResNet-56 n=1000"] |= {"sdfast float32": (1 / 4, None), "sdfast bf16": (1 / 10, None)}
else:
    TARGETS.get("ResNet-20 n=128", {}).update({"sdfast float32": (1 / 1.4, None)})
NAMES = [f"sdfast {name}" for name in PRECISIONS] + ["torch.func", "probe"]
TURNS = 1 if TINY or ON_GPU else 3


@functools.lru_cache(maxsize=1)
def problem(group):
    """(model in evaluation mode, inputs): batch norms that have seen something."""
    network, n, _ = GROUPS[group]
    torch.manual_seed(0)
    if network == "mlp":
        width = sized(2048)[0]
        model, x = sdfast.models.mlp((784, width, width, 10)), torch.randn(n, 784)
    else:
        model = sdfast.models.CifarResNet(int(network.removeprefix("resnet")))
        x = torch.randn(n, 3, 32, 32)
    model(x[:64])
    return model.eval(), x


@functools.lru_cache(maxsize=1)
def exact_corner(group):
    """The kernel of the first samples in float64."""
    model, x = problem(group)
    double = copy.deepcopy(model).double()
    return sdfast.ntk.gram(double, x[:CORNER].double(), outputs="sum", precision="float64")


def floor_flops(group):
    """A forward and backward pass of every sample, and n² p for the triangle."""
    model, x = problem(group)
    some = x[: min(len(x), 32)]
    with FlopCounterMode(display=False) as counter:
        model(some).sum().backward()
    model.zero_grad()
    parameters = sum(p.numel() for p in model.parameters())
    return counter.get_total_flops() * len(x) // len(some) + len(x) ** 2 * parameters


def by_torch_func(model, x, chunk):
    """The rows of the Jacobian of the sum of the outputs, and their products."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def of_one(p, sample):
        return functional_call(model, (p, buffers), (sample[None],)).sum()

    rows = vmap(jacrev(of_one), (None, 0), chunk_size=chunk)(parameters, x)
    total = 0
    for block in rows.values():
        flat = block.flatten(1)
        total = total + flat @ flat.T
    return total


def prepare(group, name):
    """A row's step, its corner compared."""
    model, x = problem(group)
    _, n, long = GROUPS[group]
    if name == "probe":
        if n > 128 or isinstance(model, torch.nn.Sequential):
            pytest.skip("the probe looks at up to 128 samples of a network")
        probe = InformationProbe(x, torch.randint(0, 10, (n,)), k=min(5, n))
        return Case(lambda: probe(model), floor_flops=0, rounds=3, about={"dtype": "float32"})
    if name == "torch.func":
        if long:
            pytest.skip("torch.func takes minutes, or more memory than there is")
        step = functools.partial(by_torch_func, model, x, 64)
        precision = "float32"
    else:
        precision = name.split()[1]
        step = functools.partial(sdfast.ntk.gram, model, x, outputs="sum", precision=precision)
    exact = exact_corner(group)
    side = len(exact)
    got = by_torch_func(model, x[:side], 64) if name == "torch.func" else sdfast.ntk.gram(
        model, x[:side], outputs="sum", precision=precision
    )  # fmt: skip
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error <= {"bf16": 5e-2, "tf32": 5e-3}.get(precision, 1e-4):
        raise SystemExit(f"bench_ntk: {name} is wrong at {group}: {error:.3g}")
    about = {"dtype": "bfloat16" if precision.startswith("bf16") else "float32", "corner_error": error}
    if DEVICE.type == "cuda" and n > 10_000:
        about["peak_bytes"] = 0  # measured by the timed run: a step more would take a minute
        torch.cuda.reset_peak_memory_stats()
    return Case(step, floor_flops=floor_flops(group), rounds=1, about=about)


@interleaved(GROUPS, NAMES, TURNS)
def test_kernel(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
    if DEVICE.type == "cuda" and benchmark.extra_info["peak_bytes"] == 0:
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
