"""The matrix-free kernel against the explicit one, on every kind of layer and output."""

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn

from sdfast.ntk import eigenspace, gram, operands, operator, sample_gradients

N = 14


class Lookup(nn.Module):
    """Tokens, one of them padding; a matmul with a (d, p) weight; a layer used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        h = self.embedding(tokens) @ self.weight
        return self.head(self.twice(torch.tanh(self.twice(h))).mean(1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 8, 3, groups=2),
        nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip


def wide():
    """Layers whose gradients are larger than their factors, and one that is used along a sequence."""
    head = [nn.Linear(50, 3), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.LayerNorm(50), *head)


def sequential():
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 3))


MODELS = {
    "linear": (sequential, lambda: torch.randn(N, 40)),
    "sequence": (wide, lambda: torch.randn(N, 4, 40)),
    "convolution": (convolutional, lambda: torch.randn(N, 2, 8, 8)),
    "embedding": (Lookup, lambda: torch.randint(0, 9, (N, 5))),
}
OUTPUTS = ["sum", "trace", "mean", "full", 1, pytest.param(lambda out: out.square().sum(1), id="callable")]


def made(name):
    model, inputs = MODELS[name]
    x = inputs()
    return model().double().eval(), x.double() if x.is_floating_point() else x


def little(name):
    """Bytes that hold one column of the gradients, but not all."""
    return 8_000 if name == "embedding" else 40_000


def flat(kernel):
    """Gram's (n, n, C, C) as a matrix of all pairs."""
    return kernel.movedim(2, 1).flatten(0, 1).flatten(1) if kernel.dim() == 4 else kernel


@pytest.mark.parametrize("outputs", OUTPUTS, ids=str)
@pytest.mark.parametrize("anew", [False, True], ids=["kept", "anew"])
@pytest.mark.parametrize("name", MODELS)
def test_matrix_free_is_explicit(name, anew, outputs):
    model, x = made(name)
    kernel = flat(gram(model, x, outputs=outputs))
    free = operator(model, x, outputs=outputs, memory=little(name) if anew else None, batch_size=5)
    assert free.shape == tuple(kernel.shape)
    assert free.dtype == torch.float64
    assert ("anew" in repr(free)) == anew
    columns = torch.randn(len(kernel), 5, dtype=torch.float64)
    torch.testing.assert_close(free @ columns, kernel @ columns, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(free @ columns[:, 0], kernel @ columns[:, 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(free.T @ columns, free @ columns)
    torch.testing.assert_close(free.diagonal(), kernel.diagonal(), rtol=1e-11, atol=1e-11)
    assert free.trace() == pytest.approx(kernel.trace().item(), rel=1e-11)


@pytest.mark.parametrize("anew", [False, True], ids=["kept", "anew"])
@pytest.mark.parametrize("name", MODELS)
def test_jacobian(name, anew):
    """J against the gradients per sample, and ⟨Ju, v⟩ = ⟨u, Jᵀv⟩ for it and for H."""
    model, x = made(name)
    gradients = sample_gradients(model, x, outputs="per_class")
    exact = torch.cat([g.flatten(2) for g in gradients.values()], 2).flatten(0, 1)  # (n · outputs, parameters)
    jacobian = operator(model, x, outputs="full", memory=little(name) if anew else None).jacobian
    assert jacobian.shape == tuple(exact.shape)
    assert jacobian.T.shape == jacobian.shape[::-1]
    u, v = torch.randn(exact.shape[1], 2, dtype=torch.float64), torch.randn(len(exact), 2, dtype=torch.float64)
    torch.testing.assert_close(jacobian @ u, exact @ u, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jacobian.T @ v, exact.T @ v, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(((jacobian @ u) * v).sum(), (u * (jacobian.T @ v)).sum(), rtol=1e-11, atol=1e-11)
    free = operator(model, x, outputs="full", memory=little(name) if anew else None)
    w = torch.randn_like(v)
    torch.testing.assert_close(((free @ v) * w).sum(), (v * (free @ w)).sum(), rtol=1e-11, atol=1e-11)
    scipy = jacobian.to_scipy()
    np.testing.assert_allclose(scipy.T @ v.numpy(), exact.T @ v, rtol=1e-10, atol=1e-10)


def square_layers(inputs):
    """Layers as wide as they are high: products with them cost far more than AAᵀ∘BBᵀ."""
    return nn.Sequential(nn.Linear(inputs, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3)).double()


@pytest.mark.parametrize("outputs", ["trace", "mean", "full", 1])
def test_the_matrix_of_an_operator_is_the_gram_matrix(outputs):
    for model, x in (made("sequence"), (square_layers(20), torch.randn(150, 20, dtype=torch.float64))):
        free = operator(model, x, outputs=outputs)
        matrix = free.to_dense()
        assert matrix.shape == free.shape
        assert torch.equal(matrix, matrix.T)
        torch.testing.assert_close(matrix, free @ torch.eye(len(matrix), dtype=torch.float64), rtol=1e-10, atol=1e-10)
    model, x = made("sequence")
    few = operator(model, x, outputs=outputs, memory=20_000)
    assert few._gradients.kept is None
    assert few.costs.collect > 0
    torch.testing.assert_close(few.to_dense(), operator(model, x, outputs=outputs).to_dense(), rtol=1e-10, atol=1e-10)


def test_the_cheaper_of_matrix_and_products_is_taken_and_said():
    x = torch.randn(1200, 20, dtype=torch.float64)
    model = square_layers(20)
    # 4CnΣdp of 64 columns against n²Σ(d + Cp), both counted: the matrix is cheaper,
    formed = eigenspace(operator(model, x, outputs="trace"), 4)
    assert not formed.matrix_free
    assert formed.method.startswith("H formed (")
    # but does not fit in 8 MB, where the factors do,
    free = eigenspace(operator(model, x, outputs="trace", memory=8_000_000), 4)
    assert free.matrix_free
    assert free.method.startswith("matrix-free (H takes 0.0107 GiB")
    # and one narrow layer makes products the cheaper way.
    narrow = nn.Linear(20, 1).double()
    assert eigenspace(operator(narrow, x), 4).method.startswith("matrix-free (")
    torch.testing.assert_close(formed.values, free.values, rtol=1e-9, atol=0)
    assert formed.converged.all()
    assert free.converged.all()


def test_costs_are_counted():
    model, n = square_layers(20), 50
    x = torch.randn(n, 20, dtype=torch.float64)
    costs = operator(model, x, outputs="trace").costs
    assert costs.matrix_bytes == 8 * n * n
    assert costs.collect == 0
    # weights by factors (T = 1), biases as 96 + 96 + 3 columns of rows; C = 3
    weights = 20 * 96 + 96 * 96 + 96 * 3
    assert costs.product == 4 * 3 * n * (weights + 195)
    assert costs.matrix == n * n * (20 + 96 + 96 + 3 * (96 + 96 + 3) + 3 * 195)


def test_eigenspace_of_an_operator():
    model, x = sequential(), torch.randn(300, 40)
    kernel = gram(model, x, outputs="trace", precision="float64").double()
    free = operator(model, x, outputs="trace")
    exact = torch.linalg.eigvalsh(kernel).flip(0)[:4]
    space = eigenspace(free, 4)
    assert "block Krylov" in space.method
    torch.testing.assert_close(space.values, exact, rtol=1e-5, atol=0)
    values = eigsh(free.to_scipy(), 4, return_eigenvectors=False, tol=1e-5)
    np.testing.assert_allclose(np.sort(values)[::-1], exact, rtol=1e-4)
    double = eigenspace(operator(model.double(), x.double(), outputs="trace"), 4)
    assert double.converged.all()


def test_columns_are_multiplied_in_chunks(monkeypatch):
    from sdfast.ntk import factors

    model, x = made("sequence")
    free = operator(model, x, outputs="trace")
    columns = torch.randn(N, 7, dtype=torch.float64)
    whole, diagonal = free @ columns, free.diagonal()
    monkeypatch.setattr(factors, "_BYTES", 20_000)
    torch.testing.assert_close(free @ columns, whole)
    torch.testing.assert_close(free.diagonal(), diagonal)


def test_the_model_is_left_as_it_is():
    model, x = made("convolution")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    operator(model, x, outputs="sum", memory=40_000) @ torch.randn(N, 2, dtype=torch.float64)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_norm_in_training_mode():
    model, x = made("convolution")
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel, free = gram(model, x, outputs="sum"), operator(model, x, outputs="sum")
    torch.testing.assert_close(free @ torch.eye(N, dtype=torch.float64), kernel, rtol=1e-10, atol=1e-10)


ERRORS = {
    "outputs": (lambda m, x: operator(m, x), ValueError, "outputs: the model has 3 outputs"),
    "per class": (lambda m, x: operator(m, x, outputs="per_class"), ValueError, "outputs: got 'per_class'"),
    "memory": (lambda m, x: operator(m, x, outputs="sum", memory=0), ValueError, "memory: got 0"),
    "rows": (lambda m, x: operator(m, x, outputs="sum") @ torch.randn(3, 2), ValueError, r"got shape \(3, 2\)"),
    "jacobian": (lambda m, x: operator(m, x, outputs="trace").jacobian, ValueError, "jacobian: outputs='trace' sums"),
    "model": (lambda m, x: operator(lambda x: x, x), TypeError, "model: got function"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call(*made("linear"))


def test_the_choice_between_dense_and_free():
    assert operands.as_operand(operator(*made("linear"), outputs="sum")).dense_is_cheaper(5)


class Branching(nn.Module):
    """Takes another way where a batch holds a large number: only sample by sample is it a function of the sample."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.right(x).tanh().sum(1, keepdim=True) if (x > 50).any() else self.left(x)


def test_a_model_that_takes_another_path():
    model, x = Branching().double(), torch.randn(70, 4, dtype=torch.float64)
    x[60] = 100.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel, free = gram(model, x, batch_size=1), operator(model, x, batch_size=1)
    torch.testing.assert_close(free @ torch.eye(70, dtype=torch.float64), kernel, rtol=1e-10, atol=1e-10)
