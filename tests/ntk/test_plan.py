"""The plan says what `gram` does: methods, groups, operations counted one by one; and seconds within a factor."""

import copy
import fnmatch
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sdfast.ntk import Plan, calibration, costs, gram, plan, products, request
from sdfast.ntk.blocks import collect

from . import zoo
from .oracle import assert_exact, gram_of, jacobian


def entry(made, name):
    return next(entry for entry in made.entries if entry.name == name)


def test_counts_of_a_linear_layer():
    """T = 5 positions materialised, T = 1 contracted, a bias; against counts by hand."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 6))
    made = plan(model, torch.randn(10, 5, 3), outputs="trace")
    first, bias, second = (entry(made, name) for name in ("0.weight", "0.bias", "2.weight"))
    assert [e.method for e in (first, bias, second)] == ["materialise", "materialise", "contract"]
    assert first.gradient_flops == 6 * 10 * 2 * 5 * 3 * 4
    assert first.product_flops == 6 * 10 * 10 * 12
    assert second.product_flops == 10 * 10 * (20 + 6 * 6 + 6)
    assert first.memory == 10 * 6 * 12 * 4
    assert second.memory == 10 * (20 + 6 * 6) * 4
    assert made.pass_flops == 10 * (1 + 6) * 2 * (5 * 3 * 4 + 20 * 6)
    assert made.passes == 1
    assert made.flops == made.pass_flops + sum(e.gradient_flops + e.product_flops for e in made.entries)
    assert made.activations == 4 * 10 * (5 * 4 + 20 + 6)
    assert made.peak_memory == 4 * 10 * 10 + made.activations + sum(e.memory for e in made.entries)


def test_a_bias_is_counted_with_its_weight():
    """(AAᵀ + 1)∘(BBᵀ): where its layer has one position and is contracted; whatever else becomes of the weight."""
    layer = nn.Linear(8, 6)
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 8)
    made = plan(model, x)
    bias = entry(made, "0.bias")
    assert (bias.method, bias.beside, bias.memory, bias.bytes, bias.gradient_flops) == ("contract", "0.weight", 0, 0, 0)
    assert bias.product_flops == 5 * 5 // 2
    assert bias.passes == 1
    assert ("0.bias", "0.weight") in made.groups[0].biases
    alone = plan(model, x, params=["*.bias"])
    assert {e.method for e in alone.entries} == {"materialise"}
    twice = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), layer)
    assert entry(plan(twice, x, outputs="sum"), "0.bias").method == "materialise"
    for network, params in ((model, None), (model, ["*.bias"]), (model, ["0.bias", "2.weight"]), (twice, None)):
        double, inputs = copy.deepcopy(network).double(), x.double()
        for outputs in ("sum", "trace", "full"):
            wanted = gram_of(jacobian(double, inputs, params and set(names_of(double, params))), outputs)
            assert_exact(gram(double, inputs, outputs=outputs, params=params, batch_size=2), wanted)
            assert_exact(gram(double, inputs, outputs=outputs, params=params), wanted)


def names_of(model, patterns):
    """The parameters of these patterns."""
    return [name for name, _ in model.named_parameters() if any(fnmatch.fnmatch(name, one) for one in patterns)]


def test_counts_of_a_convolution_and_of_both_sides():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 1))
    x = torch.randn(7, 2, 5, 5)
    one, two = plan(model, x), plan(model, x, torch.randn(3, 2, 5, 5))
    assert entry(one, "0.weight").gradient_flops == 7 * 2 * (2 * 2) * 4 * 2 * 9
    assert entry(two, "0.weight").gradient_flops == 10 * 2 * (2 * 2) * 4 * 2 * 9
    assert entry(one, "0.weight").product_flops == 7 * 7 * 72
    assert entry(two, "0.weight").product_flops == 2 * 7 * 3 * 72
    transposed = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Flatten(), nn.Linear(196, 1))
    assert entry(plan(transposed, x), "0.weight").gradient_flops == 7 * 2 * 25 * 2 * 4 * 9


def test_gram_follows_the_plan(monkeypatch):
    """The very groups, and as many samples through the model as passes say."""
    model, x = zoo.mlp(), torch.randn(40, 4)
    collected = []
    module = sys.modules["sdfast.ntk.gram"]  # its name in the package is the function
    monkeypatch.setattr(module, "collect", lambda source, group: collected.append(group) or collect(source, group))
    for memory in (2000, 10_000, None):
        collected.clear()
        made = plan(model, x, outputs="sum", memory=memory)
        gram(model, x, outputs="sum", memory=memory)
        assert collected == made.groups
        assert made.passes == len(collected)
    many = plan(model, x, outputs="sum", memory=2000)
    assert many.passes > 1
    assert max(e.passes for e in many.entries) >= 1


def test_little_memory_makes_small_micro_batches():
    """As many samples as have activations of `memory`; unless a size was asked for."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(180, 1))
    x, activations = torch.randn(60, 3, 8, 8), 4 * (180 + 180 + 1)
    whole = gram(model, x)
    for memory, size in ((3 * activations, 3), (30 * activations, 30), (40 * activations, 30), (None, 60)):
        made = plan(model, x, memory=memory)
        assert made.batch_size == size
        assert made.activations == size * activations
        assert_exact(gram(model, x, memory=memory), whole.double(), 1e-5)
    assert plan(model, x, memory=activations - 1).batch_size == 1
    assert plan(model, x, memory=3 * activations, batch_size=50).batch_size == 50
    assert "micro-batches of 3" in str(plan(model, x, memory=3 * activations))
    looped = nn.Sequential(nn.PReLU(), nn.Flatten(), nn.Linear(192, 1))
    assert plan(looped, x, memory=4 * 384 * 7).batch_size <= 7


def test_the_activations_of_the_larger_side_are_counted():
    model, x = zoo.mlp(), torch.randn(30, 4)
    whole = plan(model, x, outputs="sum").activations
    assert whole > 0
    assert plan(model, x, x[:5], outputs="sum").activations == whole
    assert plan(model, x[:5], x, outputs="sum").activations == whole


def test_pairs_of_positions_are_counted():
    """Both products of a tile and the product of both, of layers with several positions alone."""
    layer = nn.Linear(200, 200, bias=False)
    few, one = (plan(nn.Sequential(layer, nn.Flatten()), torch.randn(9, t, 200), outputs=0) for t in (3, 1))
    assert [entry(made, "0.weight").method for made in (few, one)] == ["contract", "contract"]
    held = [made.activations + entry(made, "0.weight").memory + 4 * 9 * 9 for made in (few, one)]
    assert few.peak_memory == held[0] + 24 * (9 * 3) ** 2
    assert one.peak_memory == held[1]
    many = plan(nn.Sequential(layer, nn.Flatten()), torch.randn(1500, 3, 200), outputs=0)
    assert entry(many, "0.weight").method == "contract"
    assert many.peak_memory == many.activations + entry(many, "0.weight").memory + 4 * 1500**2 + 24 * 2**22


def test_the_factors_of_a_symmetric_matrix_are_held_once():
    """So they fit in as much memory as they take."""
    model, x = nn.Linear(40, 30), torch.randn(50, 40)
    factors = 50 * (40 + 30) * 4
    for memory, method in ((factors, "contract"), (factors - 1, "materialise")):
        assert entry(plan(model, x, outputs="sum", memory=memory), "weight").method == method
        both = plan(model, x[:20], x[20:], outputs="sum", memory=memory)
        assert entry(both, "weight").method == method


@pytest.mark.parametrize("name", ["resnet", "gpt, tied", "lstm"])
def test_every_network_prints(name):
    make, draw, rules = zoo.ZOO[name]
    made = plan(make(), draw(9), outputs="sum")
    shown = str(made)
    for one in made.entries:
        assert one.name in shown
    assert all(rule in shown for rule in rules)
    assert "total" in shown
    assert all(f"\n{method}: " in shown for method in {one.method for one in made.entries})
    assert "predicted" not in shown
    assert made.flops > 0
    assert made.bytes > 0


def test_what_is_looped_or_unused_says_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.spare = nn.Linear(1, 1)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    made = plan(model, torch.randn(6, 3))
    assert {e.method for e in made.entries} == {"loop", "zero"}
    assert "0.weight is looped: batch norm in training mode couples the samples" in str(made)
    with pytest.raises(NotImplementedError, match="calibrate: batch norm is in training mode"):
        plan(model, torch.randn(6, 3), calibrate=True)


def test_a_plan_leaves_everything_as_it_was():
    model, x = zoo.ResNet(), zoo.images(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan(model, x, outputs="sum")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plan(model.eval(), x, outputs="sum", calibrate=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rates_decide_where_counts_nearly_tie():
    """T²(d + p + 1) within a factor of two of dp: slow pairs materialise, fast ones contract; else counts alone."""
    factors, numel, samples = (8, 128, 128), 128 * 128, (1000, 1000)
    slow, fast = costs.Rates(1e11, 1e11, 1e6), costs.Rates(1e11, 1e11, 1e15)
    pairs = costs.contracted(factors, samples, True, "one", 1).flops
    rows = costs.materialised(2 * 8 * numel, numel, samples, True, "one", 1).flops
    assert 0.5 < pairs / rows < 2
    assert not costs.contracts(factors, numel, samples, "one", 1, slow)
    assert costs.contracts((8, 128, 160), 128 * 160, samples, "one", 1, fast)
    assert costs.contracts((1, 128, 128), numel, samples, "one", 1, slow)
    assert not costs.contracts((100, 128, 128), numel, samples, "one", 1, fast)


def test_a_calibrated_plan_decides_for_gram(monkeypatch):
    """Both methods give the same matrix; which one runs is the plan's."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)).double()
    x = torch.randn(30, 3, 16, dtype=torch.float64)
    wanted = gram_of(jacobian(model, x), None)
    methods = set()
    for pairs in (1.0, 1e30):
        monkeypatch.setattr(calibration, "measure_rates", lambda *a, pairs=pairs: costs.Rates(1e11, 1e11, pairs))
        made = plan(model, x, calibrate=True)
        methods.add(entry(made, "0.weight").method)
        assert_exact(gram(model, x, plan=made), wanted)
    assert methods == {"stream", "contract"}


def test_a_plan_of_another_call_is_refused():
    model, x = zoo.mlp(), torch.randn(12, 4)
    made = plan(model, x, outputs="sum")
    gram(model, x, outputs="sum", plan=made)
    with pytest.raises(ValueError, match=r"plan: was made for samples \(12, 12\), and this call has \(11, 11\)"):
        gram(model, x[1:], outputs="sum", plan=made)
    for changed in ({"outputs": "trace"}, {"precision": "bf16"}, {"batch_size": 3}, {"memory": 10**6},
                    {"params": ["0.*"]}):  # fmt: skip
        with pytest.raises(ValueError, match=f"plan: was made for {next(iter(changed))} "):
            gram(model, x, plan=made, **{"outputs": "sum", **changed})
    with pytest.raises(TypeError, match="plan: got str, wanted"):
        gram(model, x, outputs="sum", plan="fast")


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"calibrate": 1}, TypeError, "calibrate: got int, wanted True or False"),
        ({"outputs": None}, ValueError, "outputs: the model has 3 outputs"),
        ({"memory": 0}, ValueError, "memory: got 0"),
        ({"memory": 100}, MemoryError, "memory: got 100 bytes"),
        ({"precision": "float8"}, ValueError, "precision: got 'float8'"),
        ({"batch_size": 1.5}, TypeError, "batch_size: got float"),
        ({"params": ["x"]}, ValueError, "params: 'x' matches none"),
    ],
)
def test_bad_input(options, error, told):
    with pytest.raises(error, match=told):
        plan(zoo.mlp(), torch.randn(30, 4), **{"outputs": "sum", **options})


def test_a_prediction_counts_all_passes():
    """The benchmark holds the seconds to 30 per cent of what `gram` takes; here, that nothing is left out of them."""
    model, x = nn.Sequential(nn.Conv2d(2, 24, 3), nn.Tanh(), nn.Flatten(), nn.Linear(864, 5)), torch.randn(160, 2, 8, 8)
    made = plan(model, x, outputs="trace", calibrate=True, memory=6 * 10**5)
    assert made.passes > 3  # more than are timed
    assert min(made.seconds) > 0
    assert made.seconds.total == sum(made.seconds)
    assert f"predicted: {made.seconds.total:.3g} s" in str(made)


@pytest.mark.parametrize(("outputs", "little"), [("sum", 30_000), ("full", 400_000), ("per_class", 400_000)])
def test_every_kind_of_work_is_timed(outputs, little, monkeypatch):
    """Tokens, several positions, one; both sides; a single micro-batch; more groups than are timed."""
    monkeypatch.setattr(costs, "contracts", lambda *arguments: True)
    model, x = zoo.GPT(), zoo.tokens(40)
    for options in ({}, {"x2": zoo.tokens(7)}, {"batch_size": 64}, {"memory": little}):
        made = plan(model, x, outputs=outputs, calibrate=True, **options)
        assert {e.method for e in made.entries} >= {"contract", "materialise"}
        assert all(seconds > 0 for seconds in made.seconds)
        assert ("memory" in options) == (made.passes > 1)


def resident(field):
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(field))  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell its peak of memory")
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_single_positions_hold_no_products(precision):
    """Tiles of our own, and panels of the BLAS: beside the total there is never room for one product of its size."""
    n = 2048
    a, b, total = torch.randn(n, 1, 8), torch.randn(1, n, 1, 8), torch.zeros(n, n, dtype=torch.float64)
    few = a[:64], b[:, :64]
    products.add_single_positions(torch.zeros_like(total[:64, :64]), few, few, precision, True)  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    products.add_single_positions(total, (a, b), (a, b), precision, True)
    assert resident("VmHWM") - before < n * n * 4 * 0.8
    a, b = a[:, 0].double(), b[0, :, 0].double()
    assert_exact(total.tril(), ((a @ a.T) * (b @ b.T)).tril(), {"float32": 1e-6, "tf32": 1e-3}[precision])


def test_the_default_plan_is_the_public_type():
    made = plan(zoo.mlp(), torch.randn(4, 4), outputs="sum")
    assert isinstance(made, Plan)
    assert made.memory == request.MEMORY


@pytest.mark.filterwarnings("ignore:one backward pass")
@pytest.mark.parametrize("calibrate", [False, True])
def test_a_model_that_takes_gradients_inside(calibrate):
    """As one of energies and forces does."""

    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    made = plan(Forces(), torch.randn(6, 3), outputs="trace", calibrate=calibrate)
    assert made.flops > 0
    assert made.pass_flops >= 6 * 2 * (3 * 5 + 5)
