"""What other libraries get wrong, and what a model may do inside: all of it exact, and nothing of the model changed."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.ntk import gram, sample_gradients
from sdfast.ntk.layers import linear

from . import zoo
from .oracle import assert_exact, distance, gram_of, jacobian
from .test_layers import Functional
from .test_zoo import _double, _no_fallback  # noqa: F401


def check(model, x, outputs="sum", **options):
    got = gram(model, x, outputs=outputs, batch_size=3, **options)
    assert_exact(got, gram_of(jacobian(model, x), outputs))
    return got


def test_convolution_is_no_product_of_summed_grams():
    """And its bias adds (Σ_t B)(Σ_t B)ᵀ, which with shared weights is not 1 per pair."""
    check(zoo.Pooled(nn.Conv2d(2, 3, 3, padding=1)), zoo.images(5))


def test_no_layer_is_skipped():
    """Every parameter of a network with norms and embeddings has a row that is not zero."""
    model, x = zoo.GPT(), zoo.tokens(6)
    rows = sample_gradients(model, x, outputs="per_class")
    assert set(rows) == dict(model.named_parameters()).keys()
    assert all(row.abs().sum() > 0 for row in rows.values())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, lambda c: nn.GroupNorm(2, c)])
def test_zero_gamma(norm):
    """The normalised input comes from statistics: dividing by γ would give NaN."""
    model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Linear(4, 2)).eval()
    nn.init.zeros_(model[1].weight)
    check(model, torch.randn(5, 3))


def test_zero_initialised_output_layer():
    """Every gradient below it is zero now, and none of it is for the next step."""
    model, x = zoo.mlp(), torch.randn(5, 4)
    nn.init.zeros_(model[4].weight)
    check(model, x)


def test_norm_over_a_sequence_has_one_row_per_sample():
    rows = sample_gradients(zoo.Pooled(nn.LayerNorm(3)), zoo.sequences(4), outputs="sum")
    assert {name: tuple(row.shape) for name, row in rows.items()} == {"layer.weight": (4, 3), "layer.bias": (4, 3)}


def test_more_than_one_validation_sample():
    model, x1, x2 = zoo.Pooled(nn.Linear(3, 4)), zoo.sequences(4), zoo.sequences(3)
    model(x1)
    assert_exact(gram(model, x1, x2, outputs="sum"), gram_of(jacobian(model, x1), "sum", jacobian(model, x2)))


def test_mean_and_sum_and_trace_are_three_things():
    model, x = zoo.mlp(), torch.randn(5, 4)
    grams = {name: gram(model, x, outputs=name) for name in ("sum", "trace", "mean")}
    assert_exact(grams["trace"], 3 * grams["mean"])
    assert distance(grams["sum"], grams["trace"]) > 1e-3


def test_settings_of_the_matrix_units_are_put_back():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        seen = []

        class Watching(nn.Linear):
            def forward(self, x):
                seen.append(torch.backends.cudnn.conv.fp32_precision)
                return super().forward(x)

        gram(Watching(3, 1), torch.randn(4, 3))
        assert set(seen) == {"ieee"}
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


class Rough(nn.Module):
    """Does to itself what a model may do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(3))
        self.fail_at = None

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()[0]
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise KeyError("on purpose")
        F.relu_(x)  # the input itself
        x = F.relu_(self.linear(x))
        return self.head(self.norm(x))


@pytest.mark.parametrize("fail_at", [None, 1, 4, 9])
def test_the_model_and_the_world_are_left_as_they_were(fail_at):
    model, x = Rough().eval(), torch.randn(7, 3)
    model.norm.train()
    model.norm.eval()
    model.linear.weight.grad = torch.ones(3, 3)
    model.head.bias.requires_grad_(False)
    model.fail_at = fail_at
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    data = x.clone()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    try:
        gram(model, x, outputs="trace", batch_size=2)
    except KeyError:
        assert fail_at is not None
    else:
        assert fail_at is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert versions == [p._version for p in model.parameters()]
    assert torch.equal(x, data)
    assert torch.equal(model.linear.weight.grad, torch.ones(3, 3))
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_inside_contexts_that_would_spoil_gradients(context):
    model, x = zoo.mlp(), torch.randn(5, 4)
    wanted = gram_of(jacobian(model, x), "trace")
    with context():
        assert_exact(gram(model, x, outputs="trace"), wanted)
        assert_exact(gram(model, x.clone(), outputs="trace"), wanted)


def test_views_and_in_place_operations_around_parameters():
    def forward(s, x):
        x = x * 1
        h = F.linear(x, s.w)
        h[:, 0].add_(s.b[0])
        h += s.b
        y = h + 1
        y[:, 1:] *= s.b[1:]
        return torch.tanh(y)

    check(Functional(forward, w=(3, 3), b=3), torch.randn(5, 3).abs() + 1, outputs="trace")


def test_a_parameter_written_into_a_buffer_is_looped():
    def forward(s, x):
        rows = x.new_zeros(len(x), 3)
        rows[:, :2] = s.b
        return F.linear(x + rows, s.w)

    with pytest.warns(UserWarning, match=r"one backward pass for each sample and output: b \(written by __setitem__"):
        check(Functional(forward, w=(2, 3), b=2), torch.randn(5, 3))


def test_an_input_overwritten_after_its_use_is_looped():
    def forward(s, x):
        x = F.linear(x, s.w)
        y = x + s.b
        x.mul_(2)
        return x * y

    with pytest.warns(UserWarning, match="b .an argument of add is overwritten after the call"):
        check(Functional(forward, w=(3, 3), b=3), torch.randn(5, 3))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def test_a_custom_function_hides_its_weight_and_is_looped():
    model = Functional(
        lambda s, x: Doubled.apply(torch.tanh(F.linear(x, s.first)), s.hidden), first=(4, 3), hidden=(2, 4)
    )
    with pytest.warns(UserWarning, match="one backward pass for each sample and output: hidden "):
        check(model, torch.randn(5, 3))


def test_a_scripted_module_hides_its_weights_and_is_looped():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        hidden = torch.jit.trace(nn.Linear(4, 4), torch.randn(2, 4))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), hidden, nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"one backward pass for each sample and output: 2.weight, 2.bias "):
        check(model, torch.randn(5, 3))


def test_compiled_modules_are_seen_through():
    model, x = zoo.mlp(), torch.randn(6, 4)
    compiled = nn.Sequential(model[:2], torch.compile(model[2:], backend="eager"))
    wanted = gram_of(jacobian(model, x), "trace")
    assert_exact(gram(compiled, x, outputs="trace"), wanted)
    assert_exact(gram(torch.compile(model, backend="eager"), x, outputs="trace"), wanted)


def test_a_custom_function_without_parameters_hides_nothing():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0] ** 2

    model = Functional(lambda s, x: F.linear(Cube.apply(F.linear(x, s.a)), s.b), a=(4, 3), b=(2, 4))
    check(model, torch.randn(5, 3))


class Experts(nn.Module):
    """Each sample's tokens go to the expert that a gate picks: no tensor of an expert has a sample axis."""

    def __init__(self, skip):
        super().__init__()
        self.gate = nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.skip = skip

    def forward(self, x):
        rows = x.reshape(-1, 3)
        scores = self.gate(rows).softmax(-1)
        best = scores.argmax(-1)
        out = rows.new_zeros(len(rows), 2)
        for number, expert in enumerate(self.experts):
            chosen = (best == number).nonzero()[:, 0]
            if len(chosen) or not self.skip:
                out = out.index_add(0, chosen, expert(rows[chosen]) * scores[chosen, number, None])
        return out.view(len(x), -1, 2).sum(1)


@pytest.mark.parametrize("skip", [False, True])
def test_mixture_of_experts(skip):
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(Experts(skip), zoo.sequences(7, 4, 3), outputs="trace")


def test_a_loop_over_the_samples_in_python_is_looped():
    model = Functional(lambda s, x: torch.stack([F.linear(row, s.w) for row in x]), w=(2, 3))
    with pytest.warns(UserWarning, match="one backward pass for each sample"):
        check(model, torch.randn(5, 3))


@pytest.mark.parametrize("length", [3, 6])
def test_batch_and_positions_interleaved_in_every_way(length):
    """n == T == 3 is the size of the probe itself."""
    layer = nn.Linear(3, 3)
    views = [
        lambda x: layer(x.flatten(0, 1)).unflatten(0, (len(x), -1)),
        lambda x: layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(x))).transpose(0, 1),
        lambda x: layer(x.transpose(0, 1)).transpose(0, 1),
        lambda x: layer(x[:, None])[:, 0],
    ]
    for view in views:
        model = Functional(lambda s, x, view=view: view(x).square().sum((1, 2)))
        model.layer = layer
        check(model, zoo.sequences(length, length), outputs=None)


def test_samples_in_another_order_inside_are_looped_or_exact():
    model = Functional(lambda s, x: F.linear(x.flip(0), s.w).flip(0), w=(2, 3))
    with pytest.warns(UserWarning, match="one backward pass for each sample"):
        check(model, torch.randn(6, 3))


def test_duplicated_samples_and_one_sample():
    model = zoo.GPT()
    x = zoo.tokens(1).repeat(4, 1)
    assert_exact(check(model, x), gram(model, x[:1], outputs="sum").expand(4, 4))
    check(model, torch.zeros(2, 5, dtype=torch.int64))
    check(zoo.mlp(), torch.zeros(1, 4))


def test_separate_heads_and_unused_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return torch.cat([self.one(h), self.two(h)], 1)

    model, x = Heads(), torch.randn(5, 3)
    for outputs in ("trace", "full", "per_class"):
        check(model, x, outputs=outputs)
    check(model, x, outputs=0)
    model.three = nn.Linear(4, 1)
    with pytest.warns(UserWarning, match=r"no output depends on three.weight, three.bias: their gradients are zero"):
        check(model, x, outputs="full")
    with pytest.warns(UserWarning, match="no output depends on") as told:
        gram(model, x, outputs="full")
    assert {one.filename for one in told} == {__file__}, "it points at the line of the call"


def test_inputs_of_every_kind():
    model, x = Functional(lambda s, a, b: F.linear(a, s.w) * b, w=(2, 3)), (torch.randn(5, 3), torch.randn(5, 1))
    wanted = gram_of(jacobian(model, x), "sum")
    assert_exact(gram(model, x, outputs="sum"), wanted)
    assert_exact(gram(model, list(x), outputs="sum"), wanted)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *, left, right):
            return self.inner(left, right)

    assert_exact(gram(Named(), {"right": x[1], "left": x[0]}, outputs="sum"), wanted)
    model, x = zoo.mlp(), torch.randn(5, 4)
    wanted = gram_of(jacobian(model, x), "sum")
    data = torch.utils.data.TensorDataset(x, torch.arange(5))
    assert_exact(gram(model, data, outputs="sum"), wanted)
    assert_exact(gram(model, torch.utils.data.DataLoader(data, batch_size=2), outputs="sum"), wanted)
    assert_exact(gram(model, x, data, outputs="sum"), wanted)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x, scale):
        return torch.tanh(self.linear(x)) * scale[:, None]


def test_items_of_several_inputs():
    model, x, scale = Scaled(), torch.randn(5, 4), torch.rand(5)
    wanted = gram(model, (x, scale), outputs="sum")
    for items in (
        [((row, one), 0) for row, one in zip(x, scale, strict=True)],
        [({"x": row, "scale": one}, 0) for row, one in zip(x, scale, strict=True)],
    ):  # a list is a dataset, and a loader says so
        loader = torch.utils.data.DataLoader(items, batch_size=2)
        assert torch.equal(gram(model, loader, outputs="sum"), wanted)


def test_callable_outputs():
    model, x = zoo.mlp(), torch.randn(5, 4)
    got = gram(model, x, outputs=lambda out: out.logsumexp(1))
    rows = jacobian(model, x, call=lambda m, x: m(x).logsumexp(1))
    assert_exact(got, gram_of(rows, None))


def test_a_path_chosen_by_a_value_is_looped():
    def forward(s, x):
        order = x.flatten(0, 1).sum(1).argsort()
        counts = (x.flatten(0, 1).sum(1) > 0).sum().item()
        rows = x.flatten(0, 1)[order]
        rows = torch.cat([F.linear(rows[: len(rows) - counts], s.a), F.linear(rows[len(rows) - counts :], s.b)])
        return torch.zeros_like(rows).index_copy(0, order, rows).view(len(x), -1)

    for _ in range(4):
        with pytest.warns(UserWarning, match="one backward pass for each sample and output"):
            check(Functional(forward, a=(2, 3), b=(2, 3)), zoo.sequences(7, 4, 3).add(0.1), outputs="trace")


def test_selected_rows_that_come_back_are_followed_again():
    """Only what works on the selected rows themselves is looped."""

    def forward(s, x):
        x = F.linear(x, s.a)
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = F.linear(x[chosen], s.b)
        return F.linear(x + out, s.c)

    with pytest.warns(UserWarning, match=r"each sample and output: b \(linear works on rows that are selected by"):
        check(Functional(forward, a=(3, 3), b=(3, 3), c=(2, 3)), zoo.sequences(6), outputs="trace")


@pytest.mark.parametrize("wrong", ["doubled", "shuffled", "lost"])
def test_wrong_factors_are_found_before_they_are_multiplied(wrong, monkeypatch):
    """A layer that is contracted has no gradient to be compared: its factors are."""
    original = linear.LinearRule.factors

    def factors(self, call, gradient):
        a, b = original(self, call, gradient)
        return {"doubled": (a, 2 * b), "shuffled": (a.flip(1), b), "lost": (a, torch.zeros_like(b))}[wrong]

    monkeypatch.setattr(linear.LinearRule, "factors", factors)
    model, x = zoo.Pooled(nn.Linear(40, 50)), torch.randn(6, 2, 40)
    with pytest.warns(UserWarning, match="layer.weight .its captured factors differ"):
        check(model, x)
