"""Every rule alone, with every option, against the contraction of a plain Jacobian in float64."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.ntk import gram, operator, plan, products
from sdfast.ntk.layers import generic

from . import zoo
from .oracle import assert_exact, distance, gram_of, jacobian
from .test_zoo import _double, _no_fallback, rules_of  # noqa: F401  (fixtures of every test here too)

G = "vmap of the operation"


class Functional(nn.Module):
    """Parameters of given shapes, and a function of them and the input."""

    def __init__(self, function, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.function = function

    def forward(self, *x):
        return self.function(self, *x)


def conv(d, *arguments, **options):
    return getattr(nn, f"Conv{d}d")(*arguments, **options)


def transposed(d, *arguments, **options):
    return getattr(nn, f"ConvTranspose{d}d")(*arguments, **options)


def volume(n, d, channels=2, size=5):
    return torch.randn(n, channels, *[size - axis for axis in range(d)])


# name -> (layer, input of n samples, the rule)
LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), lambda n: torch.randn(n, 3), "linear"),
    "linear, positions": (lambda: nn.Linear(3, 4), lambda n: torch.randn(n, 5, 3), "linear"),
    "linear, two axes of positions": (lambda: nn.Linear(3, 4, bias=False), lambda n: torch.randn(n, 2, 3, 3), "linear"),
    "linear, positions first": (lambda: zoo.SequenceFirst(nn.Linear(3, 4)), lambda n: torch.randn(n, 5, 3), "linear"),
    "linear, n T merged": (
        lambda: Functional(lambda s, x: F.linear(x.flatten(0, 1), s.w, s.b).unflatten(0, (len(x), -1)), w=(4, 3), b=4),
        lambda n: torch.randn(n, 5, 3),
        "linear",
    ),
    "linear, T n merged": (
        lambda: Functional(
            lambda s, x: F.linear(x.transpose(0, 1).flatten(0, 1), s.w).unflatten(0, (-1, len(x))).transpose(0, 1),
            w=(4, 3),
        ),
        lambda n: torch.randn(n, 4, 3),
        "linear",
    ),
    "matmul": (lambda: Functional(lambda s, x: x @ s.w, w=(3, 4)), lambda n: torch.randn(n, 2, 3), "matmul"),
    "mm": (lambda: Functional(lambda s, x: torch.mm(x, s.w), w=(3, 4)), lambda n: torch.randn(n, 3), "matmul"),
    "addmm": (
        lambda: Functional(lambda s, x: torch.addmm(s.b, x, s.w), w=(3, 4), b=4),
        lambda n: torch.randn(n, 3),
        "addmm",
    ),
    "addmm, scaled": (
        lambda: Functional(lambda s, x: torch.addmm(s.b, x, s.w, beta=2, alpha=0.5), w=(3, 4), b=4),
        lambda n: torch.randn(n, 3),
        G,
    ),
    "einsum": (lambda: Functional(lambda s, x: torch.einsum("ntd,dk->ntk", x, s.w), w=(3, 4)), zoo.sequences, G),
    "parameter first": (lambda: Functional(lambda s, x: s.w @ x.mT, w=(4, 3)), zoo.sequences, G),
    "layer norm": (lambda: nn.LayerNorm(3), lambda n: torch.randn(n, 3), "layer norm"),
    "layer norm, positions": (lambda: nn.LayerNorm(3), zoo.sequences, "layer norm"),
    "layer norm, two axes": (lambda: nn.LayerNorm((5, 3)), lambda n: torch.randn(n, 2, 5, 3), "layer norm"),
    "layer norm, no bias": (lambda: nn.LayerNorm(3, bias=False), zoo.sequences, "layer norm"),
    "rms norm": (lambda: nn.RMSNorm(3), zoo.sequences, "RMS norm"),
    "rms norm, eps": (lambda: nn.RMSNorm((5, 3), eps=0.1), zoo.sequences, "RMS norm"),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda n: zoo.images(n, 4), "group norm"),
    "group norm, vectors": (lambda: nn.GroupNorm(2, 4), lambda n: torch.randn(n, 4), "group norm"),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3).eval(), lambda n: torch.randn(n, 3), "batch norm"),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(5).eval(), zoo.sequences, "batch norm"),
    "batch norm 2d": (lambda: nn.BatchNorm2d(2).eval(), zoo.images, "batch norm"),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2).eval(), lambda n: volume(n, 3), "batch norm"),
    "instance norm": (lambda: nn.InstanceNorm2d(2, affine=True), zoo.images, "instance norm"),
    "instance norm, running": (
        lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
        zoo.sequences,
        "instance norm",
    ),
    "instance norm, running, eval": (
        lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True).eval(),
        zoo.sequences,
        "instance norm",
    ),
    "embedding": (lambda: nn.Embedding(7, 3), zoo.tokens, "embedding"),
    "embedding, one token": (lambda: nn.Embedding(7, 3), lambda n: torch.randint(0, 7, (n,)), "embedding"),
    "embedding, padding": (lambda: nn.Embedding(7, 3, padding_idx=2), zoo.tokens, "embedding"),
    "embedding, negative padding": (
        lambda: nn.Embedding(3, 3, padding_idx=-1),
        lambda n: zoo.tokens(n, 3),
        "embedding",
    ),
    "embedding, sparse": (lambda: nn.Embedding(7, 3, sparse=True), zoo.tokens, "embedding"),
    "embedding, int32": (lambda: nn.Embedding(7, 3), lambda n: zoo.tokens(n).int(), "embedding"),
    "embedding, large table": (lambda: nn.Embedding(300, 3), lambda n: zoo.tokens(n, 300), "embedding"),
    "embedding by index": (lambda: Functional(lambda s, x: s.w[x], w=(7, 3)), zoo.tokens, G),
    "bag, mean": (lambda: nn.EmbeddingBag(7, 3), zoo.tokens, "embedding bag"),
    "bag, sum": (lambda: nn.EmbeddingBag(7, 3, mode="sum", padding_idx=1), zoo.tokens, "embedding bag"),
    "bag, mean, padding": (lambda: nn.EmbeddingBag(3, 3, padding_idx=1), lambda n: zoo.tokens(n, 3), "embedding bag"),
    "bag, max": (lambda: nn.EmbeddingBag(7, 3, mode="max"), zoo.tokens, G),
    "prelu": (lambda: nn.PReLU(2), zoo.images, G),
    "bilinear": (lambda: Functional(lambda s, x: F.bilinear(x, x, s.w, s.b), w=(2, 3, 3), b=2), zoo.sequences, G),
    "scale and shift": (lambda: Functional(lambda s, x: x * s.w + s.b, w=(3,), b=()), zoo.sequences, G),
    "scale in place": (
        lambda: Functional(lambda s, x: (x * 2).mul_(s.w).add_(s.b), w=(3,), b=(5, 1)),
        zoo.sequences,
        G,
    ),
    "scale a part in place": (
        lambda: Functional(lambda s, x: _scaled_part(s, x.clone()), w=(3,)),
        zoo.sequences,
        G,
    ),
    "power": (lambda: Functional(lambda s, x: x.abs() ** s.w, w=(3,)), zoo.sequences, G),
    "gru cell": (lambda: nn.GRUCell(3, 4), lambda n: torch.randn(n, 3), G),
    "lstm cell": (lambda: First(nn.LSTMCell(3, 4)), lambda n: torch.randn(n, 3), G),
    "attention to learned queries": (
        lambda: Functional(lambda s, x: F.scaled_dot_product_attention(s.q.expand(len(x), -1, -1), x, x), q=(1, 2, 3)),
        zoo.sequences,
        G,
    ),
    "learned keys": (
        lambda: Functional(lambda s, x: F.scaled_dot_product_attention(x, s.k, s.k), k=(4, 3)),
        zoo.sequences,
        G,
    ),
}
for _d in (1, 2, 3):
    LAYERS |= {
        f"conv {_d}d": (lambda d=_d: conv(d, 2, 3, 3), lambda n, d=_d: volume(n, d), f"convolution {_d}d"),
        f"conv {_d}d, stride, padding, dilation": (
            lambda d=_d: conv(d, 2, 3, 2, stride=2, padding=1, dilation=2),
            lambda n, d=_d: volume(n, d),
            f"convolution {_d}d",
        ),
        f"conv {_d}d, same, even kernel": (
            lambda d=_d: conv(d, 2, 3, 2, padding="same"),
            lambda n, d=_d: volume(n, d),
            f"convolution {_d}d",
        ),
        f"conv {_d}d, same, dilated": (
            lambda d=_d: conv(d, 2, 3, 3, padding="same", dilation=2, bias=False),
            lambda n, d=_d: volume(n, d),
            f"convolution {_d}d",
        ),
        f"conv {_d}d, valid, groups": (
            lambda d=_d: conv(d, 4, 6, 2, padding="valid", groups=2),
            lambda n, d=_d: volume(n, d, 4),
            f"convolution {_d}d",
        ),
        f"conv {_d}d, depthwise, circular": (
            lambda d=_d: conv(d, 3, 6, 3, padding=1, groups=3, padding_mode="circular"),
            lambda n, d=_d: volume(n, d, 3),
            f"convolution {_d}d",
        ),
        f"conv {_d}d, transposed": (
            lambda d=_d: transposed(d, 2, 3, 3, stride=2, padding=1, output_padding=1),
            lambda n, d=_d: volume(n, d, 2, 4),
            f"transposed convolution {_d}d",
        ),
        f"conv {_d}d, transposed, groups, dilated": (
            lambda d=_d: transposed(d, 4, 4, 2, dilation=2, groups=2),
            lambda n, d=_d: volume(n, d, 4, 4),
            f"transposed convolution {_d}d",
        ),
    }
LAYERS |= {
    "conv 2d, uneven": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        lambda n: volume(n, 2, 2, 6),
        "convolution 2d",
    ),
    "conv 2d of frames": (
        lambda: Functional(
            lambda s, x: F.conv2d(x.flatten(0, 1), s.w, s.b, padding=1).unflatten(0, (len(x), -1)), w=(3, 2, 3, 3), b=3
        ),
        lambda n: torch.randn(n, 3, 2, 4, 4),
        "convolution 2d",
    ),
    "conv 2d, channels last": (
        lambda: nn.Conv2d(2, 3, 3, padding=1).to(memory_format=torch.channels_last),
        lambda n: zoo.images(n).to(memory_format=torch.channels_last),
        "convolution 2d",
    ),
    "conv 2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), zoo.images, "convolution 2d"),
}


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def _scaled_part(model, x):
    x[:, 1].mul_(model.w)
    return x * x


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, draw, rule = LAYERS[name]
    model, x = zoo.Pooled(make()), draw(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, once, of a copy that an even kernel costs
        model(x)
    assert rules_of(model, x) == {rule}
    wanted = jacobian(model, x)
    for outputs in ("trace", "full"):
        assert_exact(gram(model, x, outputs=outputs, batch_size=4), gram_of(wanted, outputs))
    free, columns, exact = (
        operator(model, x, outputs="trace", batch_size=4),
        torch.randn(6, 2),
        gram_of(wanted, "trace"),
    )
    assert_exact(free @ columns, exact @ columns)
    assert_exact(free.diagonal(), exact.diagonal())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "need_weights": True},
        {"kdim": 3, "vdim": 2},
        {"add_bias_kv": True, "batch_first": True},
        {"add_zero_attn": True, "bias": False},
        {"add_bias_kv": True, "kdim": 3, "vdim": 2, "need_weights": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_multi_head_attention(options, training):
    model, x = zoo.MultiHead(**options).train(training), zoo.sequences(6, 6, 4)
    assert_exact(gram(model, x, outputs="trace", batch_size=4), gram_of(jacobian(model, x), "trace"))


@pytest.mark.parametrize("mask", ["padding", "causal", "heads"])
def test_attention_masks(mask):
    core = nn.MultiheadAttention(4, 2, batch_first=True)
    padding = torch.rand(6, 5) < 0.3
    padding[:, 0] = False

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = core

        def forward(self, x, padded):
            options = {"key_padding_mask": padded}
            if mask == "causal":
                options = {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}
            if mask == "heads":
                options = {"attn_mask": padded[:, None, None].expand(-1, 2, 5, -1).flatten(0, 1)}
            return self.core(x, x, x, need_weights=False, **options)[0].flatten(1)[:, ::3]

    model, x = Masked(), (zoo.sequences(6, 5, 4), padding)
    assert_exact(gram(model, x, outputs="trace", batch_size=4), gram_of(jacobian(model, x), "trace"))


@pytest.mark.parametrize(
    "name", ["weight norm", "tied", "transposed", "concatenated", "chunked", "masked", "shared bias"]
)
def test_virtual_parameters(name):
    def shared_bias(s, x):
        return F.layer_norm(x, (3,), s.v, s.v) @ s.w

    functions = {
        "tied": (lambda s, x: F.linear(torch.tanh(F.linear(x, s.w)), s.w.T), {"w": (4, 3)}),
        "transposed": (lambda s, x: x @ s.w.T + s.w.mT.sum(0), {"w": (4, 3)}),
        "concatenated": (
            lambda s, x: F.linear(x, torch.cat([s.w, s.v[None]]), s.v.repeat(2)[:5]),
            {"w": (4, 3), "v": 3},
        ),
        "chunked": (lambda s, x: sum(F.linear(x, part) for part in s.w.chunk(2)), {"w": (4, 3)}),
        "masked": (lambda s, x: F.linear(x, s.w * (torch.arange(12).view(4, 3) % 2)) * s.w[1, 1], {"w": (4, 3)}),
        "shared bias": (shared_bias, {"w": (3, 4), "v": 3}),
    }
    if name == "weight norm":
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    else:
        function, shapes = functions[name]
        model = Functional(function, **shapes)
    x = torch.randn(6, 3)
    for outputs, batch_size in itertools.product(("trace", "sum"), (1, 4)):
        got = gram(model, x, outputs=outputs, batch_size=batch_size)
        assert_exact(got, gram_of(jacobian(model, x), outputs))


def test_spectral_norm_in_training_mode_keeps_its_vectors():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)).eval()
    x = torch.randn(5, 3)
    assert_exact(gram(model, x), gram_of(jacobian(model, x), None))


def test_checkpointed_block():
    block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = block, nn.Linear(3, 1)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False))

    model, x = Checkpointed(), torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is computed again in the backward knows no jittered parameter: looped
        assert_exact(gram(model, x), gram_of(jacobian(model, x), None))


@pytest.mark.parametrize("name", ["vit", "lstm", "gru, sequence first", "gpt, tied"])
def test_operations_that_cannot_be_vmapped(name, monkeypatch):
    def fail(*_):
        raise RuntimeError("vmap: not possible")

    monkeypatch.setattr(generic.VmapRule, "_rows", fail)
    make, draw, rules = zoo.ZOO[name]
    model, x = make(), draw(6)
    if name == "vit":  # the class token's expansion is no operation on a sample
        with pytest.warns(UserWarning, match="one backward pass for each sample and output: token "):
            got = gram(model, x, outputs="trace", batch_size=4)
    else:
        assert rules_of(model, x) == rules - {G} | {"loop over the samples of the operation"}
        got = gram(model, x, outputs="trace", batch_size=4)
    assert_exact(got, gram_of(jacobian(model, x), "trace"))


@pytest.mark.parametrize("function", ["bias", "weight"])
def test_frozen_parameters_are_left_out(function):
    model, x = zoo.mlp(), torch.randn(5, 4)
    model[0].requires_grad_(False)
    getattr(model[2], function).requires_grad_(False)
    assert_exact(gram(model, x, outputs="sum"), gram_of(jacobian(model, x), "sum"))
    assert distance(gram(model, x, outputs="sum", params=["4.*"]), gram_of(jacobian(model, x), "sum")) > 1e-3
    wanted = gram_of(jacobian(model, x, ["4.weight", "4.bias"]), "sum")
    assert_exact(gram(model, x, outputs="sum", params=["4.*"]), wanted)
    assert_exact(gram(model, x, outputs="sum", params=lambda name: name.startswith("4")), wanted)


def test_every_form_of_contraction(monkeypatch):
    """Small tiles of position pairs, and layers that the counted rule would never contract."""
    monkeypatch.setattr(products, "PAIRS_AT_ONCE", 40)
    monkeypatch.setattr("sdfast.ntk.costs.contracts", lambda *a: True)
    monkeypatch.setattr("sdfast.ntk.guard.may_serve", lambda *a: True)
    for name in (
        "linear, positions",
        "linear, T n merged",
        "matmul",
        "addmm",
        "embedding, padding",
        "bag, mean, padding",
        "conv 2d, uneven",
        "conv 2d of frames",
        "conv 3d, same, even kernel",
        "conv 1d, stride, padding, dilation",
    ):
        make, draw, _ = LAYERS[name]
        model, x1, x2 = zoo.Pooled(make()), draw(5), draw(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, once, of a copy that an even kernel costs
            model(x1)
        rows = jacobian(model, x1), jacobian(model, x2)
        assert "contract" in {entry.method for entry in plan(model, x1, outputs="sum").entries}
        for outputs in ("sum", "trace", "per_class", "full"):
            assert_exact(gram(model, x1, outputs=outputs, batch_size=2), gram_of(rows[0], outputs))
            assert_exact(gram(model, x1, x2, outputs=outputs, batch_size=2), gram_of(rows[0], outputs, rows[1]))
