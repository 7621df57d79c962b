"""What cannot be exact, or is no question, is refused in a sentence that says what came and what is wanted."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdfast.ntk import gram, result, sample_gradients
from sdfast.ntk.layers import register

from . import zoo
from .oracle import assert_exact, gram_of, jacobian
from .test_layers import Functional


def linear(outputs=1):
    return nn.Linear(3, outputs)


X = torch.randn(4, 3)


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.body, self.noise = nn.Linear(3, 1), Functional(lambda s, x: x + draw(x))

    def forward(self, x):
        return self.noise(self.body(x))


BAD = {
    "not a module": (lambda: gram(lambda x: x, X), TypeError, "model: got function, wanted a torch.nn.Module"),
    "no parameters": (lambda: gram(nn.ReLU(), X), ValueError, "model: no parameter that requires grad is left"),
    "frozen": (lambda: gram(linear().requires_grad_(False), X), ValueError, "model: no parameter that requires grad"),
    "several outputs": (
        lambda: gram(linear(2), X),
        ValueError,
        "outputs: the model has 2 outputs; choose 'sum' .*'trace' .*'mean' .*'per_class' .*'full' .*index.*callable",
    ),
    "unknown outputs": (
        lambda: gram(linear(2), X, outputs="all"),
        ValueError,
        "outputs: got 'all', wanted one of 'sum', 'trace', 'mean'",
    ),
    "outputs of another type": (
        lambda: gram(linear(2), X, outputs=1.5),
        TypeError,
        "outputs: got float, wanted one of",
    ),
    "no such output": (
        lambda: gram(linear(2), X, outputs=2),
        IndexError,
        r"outputs: got 2, wanted an index in \[0, 2\)",
    ),
    "negative output": (lambda: gram(linear(2), X, outputs=-1), IndexError, "outputs: got -1"),
    "callable of another shape": (
        lambda: gram(linear(2), X, outputs=lambda out: out),
        ValueError,
        r"outputs: the callable gave shape \(2, 2\) for a batch of 2 samples, wanted one scalar for each, \(2,\)",
    ),
    "callable that gives no tensor": (
        lambda: gram(linear(2), X, outputs=lambda out: 1.0),
        TypeError,
        "outputs: the callable gave float, wanted a tensor",
    ),
    "constant output": (
        lambda: gram(linear(2), X, outputs=lambda out: out.detach()[:, 0]),
        ValueError,
        "gave a constant: it does not",
    ),
    "output without samples": (
        lambda: gram(Functional(lambda s, x: F.linear(x, s.w).sum(), w=(1, 3)), X),
        ValueError,
        r"model: its output has shape \(\) for a batch of 2 samples, wanted \(2, ...\)",
    ),
    "output of another length": (
        lambda: gram(Functional(lambda s, x: F.linear(x, s.w).repeat(2, 1), w=(1, 3)), X),
        ValueError,
        r"model: its output has shape \(4, 1\) for a batch of 2 samples",
    ),
    "output that is no tensor": (
        lambda: gram(Functional(lambda s, x: {"a": F.linear(x, s.w)}, w=(1, 3)), X),
        TypeError,
        "model: its output is dict, wanted a tensor; pass outputs=callable",
    ),
    "integer output": (
        lambda: gram(Functional(lambda s, x: F.linear(x, s.w).argmax(1), w=(2, 3)), X),
        TypeError,
        "model: its output is int64, wanted a real floating tensor",
    ),
    "per class of sample gradients": (
        lambda: sample_gradients(linear(2), X, outputs="trace"),
        ValueError,
        "outputs: got 'trace', .* wanted 'per_class'",
    ),
    "unknown precision": (
        lambda: gram(linear(), X, precision="fp8"),
        ValueError,
        "precision: got 'fp8', wanted one of 'float32', 'float64'",
    ),
    "batch size 0": (lambda: gram(linear(), X, batch_size=0), ValueError, "batch_size: got 0, wanted at least 1"),
    "batch size of another type": (lambda: gram(linear(), X, batch_size=2.0), TypeError, "batch_size: got float"),
    "memory of another type": (
        lambda: gram(linear(), X, memory="1G"),
        TypeError,
        "memory: got str, wanted a number of",
    ),
    "memory 0": (lambda: gram(linear(), X, memory=0), ValueError, "memory: got 0, wanted at least 1 byte"),
    "too little memory": (
        lambda: gram(linear(), X, memory=15),
        MemoryError,
        "memory: got 15 bytes, but one column of the gradients of 4 ",
    ),
    "params as a string": (lambda: gram(linear(), X, params="weight"), TypeError, "params: got str, wanted names of"),
    "unknown params": (
        lambda: gram(linear(), X, params=["wait"]),
        ValueError,
        "params: 'wait' matches none of the parameters weight, bias",
    ),
    "frozen params": (
        lambda: gram(nn.Sequential(linear(3), linear().requires_grad_(False)), X, params=["1.*"]),
        ValueError,
        "params: 1.weight, 1.bias do not require grad",
    ),
    "no params": (lambda: gram(linear(), X, params=[]), ValueError, "params: no parameter"),
    "empty x": (lambda: gram(linear(), X[:0]), ValueError, "x1: got no sample, wanted at least one"),
    "empty x2": (lambda: gram(linear(), X, X[:0]), ValueError, "x2: got no sample"),
    "x without axes": (lambda: gram(linear(), X[0, 0]), ValueError, "x1: got a tensor without axes"),
    "an array": (lambda: gram(linear(), X.numpy()), TypeError, "x1: got ndarray, wanted a tensor, a tuple or dict"),
    "an empty tuple": (lambda: gram(linear(), ()), TypeError, "x1: got tuple, wanted a tensor"),
    "different lengths": (
        lambda: gram(linear(), (X, X[:2])),
        ValueError,
        "x1: got {0: 4, 1: 2} samples, wanted the same number in every",
    ),
    "another dtype": (lambda: gram(linear(), X.double()), ValueError, "x1: got float64, wanted float32 as the model's"),
    "another device": (lambda: gram(linear(), X.to("meta")), ValueError, "x1: is on meta, wanted cpu as the model's"),
    "float16": (
        lambda: gram(linear().half(), X.half()),
        TypeError,
        r"model: parameter weight is float16, .*call model.float\(\)",
    ),
    "bfloat16": (lambda: gram(linear().bfloat16(), X.bfloat16()), TypeError, "model: parameter weight is bfloat16"),
    "complex": (
        lambda: gram(nn.Linear(3, 1, dtype=torch.complex64), X),
        TypeError,
        "weight is complex64, wanted float32",
    ),
    "mixed dtypes": (
        lambda: gram(nn.Sequential(linear(3), linear().double()), X),
        ValueError,
        "model: parameter 1.weight has dtype torch.float64, wanted torch.float32 as 0.weight has",
    ),
    "mixed devices": (
        lambda: gram(nn.Sequential(linear(3), linear().to("meta")), X),
        ValueError,
        "model: parameter 1.weight has device meta, wanted cpu as 0.weight has",
    ),
    "a loader that shuffles": (
        lambda: gram(linear(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), shuffle=True)),
        ValueError,
        "x1: the loader shuffles",
    ),
    "a dataset of more than an input and a label": (
        lambda: gram(linear(), torch.utils.data.TensorDataset(X, X, X)),
        ValueError,
        r"x1: got an item of 3 parts, wanted \(input,\) or \(input, label\); several inputs are one part",
    ),
    "a loader of such": (
        lambda: gram(linear(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X, X))),
        ValueError,
        "x1: got an item of 3 parts",
    ),
    "dropout": (
        lambda: gram(nn.Sequential(linear(3), nn.Dropout(0.1), linear()), X),
        ValueError,
        r"model: 1 \(Dropout\) draws random numbers, .*model.eval\(\)",
    ),
    "noise": (
        lambda: gram(Noisy(torch.randn_like), X),
        ValueError,
        r"model: noise \(Functional\) draws random numbers",
    ),
    "NumPy's noise": (
        lambda: gram(Noisy(lambda x: np.random.rand()), X),
        ValueError,
        r"model: noise \(Functional\) draws",
    ),
    "attention dropout": (
        lambda: gram(
            zoo.Pooled(nn.TransformerEncoderLayer(4, 2, 4, 0.1, batch_first=True)), zoo.sequences(4, 3, 4), outputs=0
        ),
        ValueError,
        r"model: layer.self_attn \(MultiheadAttention\) draws",
    ),
    "coupled samples": (
        lambda: gram(Functional(lambda s, x: F.linear(x - x.mean(0), s.w), w=(1, 3)), X),
        ValueError,
        "model: the output of one sample changes with another sample of the batch; only batch norm in training mode",
    ),
    "coupled behind batch norm": (
        lambda: gram(nn.Sequential(nn.BatchNorm1d(3), Functional(lambda s, x: x.softmax(0) @ s.w, w=(3, 1))), X),
        ValueError,
        "model: the output of one sample changes with another sample",
    ),
    "max_norm": (
        lambda: gram(nn.Embedding(7, 1, max_norm=1.0), torch.randint(0, 7, (4,))),
        NotImplementedError,
        "embedding: got max_norm=1.0, which overwrites the weight",
    ),
    "scale_grad_by_freq": (
        lambda: gram(nn.Embedding(7, 1, scale_grad_by_freq=True), torch.randint(0, 7, (4,))),
        NotImplementedError,
        "embedding: got scale_grad_by_freq=True",
    ),
    "out of another shape": (
        lambda: gram(linear(), X, out=torch.zeros(3, 3)),
        ValueError,
        r"out: got shape \(3, 3\), wanted \(4, 4\)",
    ),
    "out of another dtype": (
        lambda: gram(linear(), X, out=np.zeros((4, 4))),
        TypeError,
        "out: got float64, wanted float32",
    ),
    "out of another type": (lambda: gram(linear(), X, out=[[0.0]]), TypeError, "out: got list, wanted a torch.Tensor"),
    "out that requires grad": (
        lambda: gram(linear(), X, out=torch.zeros(4, 4, requires_grad=True)),
        ValueError,
        "out: requires grad",
    ),
    "a rule that is none": (lambda: register(len, F.linear), TypeError, "rule: got builtin_function_or_method, wanted"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_a_sentence(name):
    act, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_a_read_only_out():
    array = np.zeros((4, 4), np.float32)
    array.setflags(write=False)
    with pytest.raises(ValueError, match="out: got an array that cannot be written"):
        gram(linear(), X, out=array)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rectangular", [False, True])
def test_gradients_that_are_not_finite_name_the_layer(precision, rectangular):
    model = nn.Sequential(
        nn.Linear(3, 3), Functional(lambda s, x: torch.sqrt(x * 0 * s.scale + s.scale), scale=3), linear()
    )
    with torch.no_grad():
        model[1].scale.copy_(torch.tensor([1.0, 0.0, 2.0]))
    options = {"precision": precision, "params": ["1.*", "2.*"]}
    with pytest.raises(FloatingPointError, match=r"model: gradients of 1\.scale are NaN or infinite"):
        gram(model, X, X[:2] if rectangular else None, **options)


def test_products_beyond_float32():
    model = linear()
    x = torch.full((4, 3), 1e25)
    with pytest.raises(FloatingPointError, match="exceed float32; use precision='float64'"):
        gram(model, x)
    rows = jacobian(model, x).double()
    assert_exact(gram(model, x, precision="float64"), gram_of(rows, None), 1e-7)


def test_a_result_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(result, "_free_memory", lambda device: 50)
    with pytest.raises(
        MemoryError, match=r"H: a result of shape \(4, 4\) takes 0.0 GiB and 0.0 GiB are free; pass out="
    ):
        gram(linear(), X)
    assert gram(linear(), X, out=torch.empty(4, 4)).shape == (4, 4)
