"""Every bad input gets one line that names the argument, what came and what is wanted."""

import pytest
import torch
from helpers import backends

import sdfast
from sdfast import AdaptiveAlpha, ClipLabel
from sdfast import self_distillation_loss as sd

X = torch.randn(4, 3)
Y = torch.tensor([0, 1, 2, 0])
P = torch.rand(4, 3).softmax(-1)

BAD_CALLS = {
    "logits no tensor": (lambda: sd([[1.0]], Y, 0.5), TypeError, "logits: got list"),
    "integer logits": (lambda: sd(X.long(), Y, 0.5), TypeError, "logits: got int64, wanted float32"),
    "complex logits": (lambda: sd(X + 0j, Y, 0.5), TypeError, "logits: got complex64"),
    "0-d logits": (lambda: sd(X[0, 0], Y[0], 0.5), ValueError, r"logits: got shape \(\)"),
    "no classes": (lambda: sd(X[:, :0], Y, 0.5), ValueError, r"logits: got shape \(4, 0\)"),
    "labels no tensor": (lambda: sd(X, [0, 1, 2, 0], 0.5), TypeError, "labels: got list"),
    "labels too few": (lambda: sd(X, Y[:3], 0.5), ValueError, r"labels: got int64 of shape \(3,\)"),
    "labels one-hot integers": (lambda: sd(X, X.long(), 0.5), ValueError, r"wanted \(4,\) indices"),
    "labels bool": (lambda: sd(X, Y.bool(), 0.5), TypeError, "labels: got bool"),
    "labels float": (lambda: sd(X, Y.float(), 0.5), ValueError, r"or integers for class indices"),
    "probability rows of another width": (
        lambda: sd(X, P[:, :2], 0.5), ValueError, r"labels: got float32 of shape \(4, 2\)"),
    "labels too large": (
        lambda: sd(X, Y + 2, 0.5), IndexError, "labels: row 1 is 3, wanted 0 <= label < 3"),
    "labels negative": (lambda: sd(X, Y - 1, 0.5), IndexError, "labels: row 0 is -1"),
    "class-first logits": (
        lambda: sd(torch.randn(2, 3, 5, 5), torch.zeros(2, 5, 5).long(), 0.5), ValueError,
        r"class-first: wanted the classes last, as in logits.movedim\(1, -1\)"),
    "labels that require grad": (
        lambda: sd(X, P.clone().requires_grad_(), 0.5), ValueError, "labels: requires grad"),
    "alpha that requires grad": (
        lambda: sd(X, Y, torch.tensor(0.5, requires_grad=True)), ValueError, "alpha: requires grad"),
    "weights that require grad": (
        lambda: sd(X, Y, 0.5, row_weight=torch.rand(4).requires_grad_()), ValueError,
        "row_weight: requires grad"),
    "alpha above one": (lambda: sd(X, Y, 1.5), ValueError, r"alpha: got 1.5, wanted within \[0, 1\]"),
    "alpha below zero": (lambda: sd(X, Y, -0.1, loss="brier"), ValueError, "alpha: got -0.1"),
    "NaN alpha": (lambda: sd(X, Y, float("nan")), ValueError, "alpha: got nan"),
    "infinite alpha": (lambda: sd(X, X, torch.inf, loss="mse"), ValueError, "alpha: got inf"),
    "alpha a string": (lambda: sd(X, Y, "half"), TypeError, "alpha: got str"),
    "alpha rows too few": (lambda: sd(X, Y, torch.rand(3)), ValueError, r"alpha: got shape \(3,\)"),
    "alpha integers": (lambda: sd(X, Y, torch.tensor(1)), TypeError, "alpha: got int64"),
    "alpha tensor above one": (
        lambda: sd(X, Y, torch.tensor([0, 0.5, 1, 2])), ValueError, "alpha: row 3 is 2"),
    "alpha tensor NaN": (
        lambda: sd(X, X, torch.tensor(torch.nan), loss="mse"), ValueError, "alpha: row 0 is "),
    "unknown label_fn": (lambda: sd(X, Y, 0.5, label_fn="hard"), ValueError, "label_fn: got 'hard'"),
    "unknown loss": (lambda: sd(X, Y, 0.5, loss="mae"), ValueError, "loss: got 'mae', wanted one of"),
    "unhashable loss": (lambda: sd(X, Y, 0.5, loss=["kl"]), ValueError, "loss: got"),
    "unknown reduction": (
        lambda: sd(X, Y, 0.5, reduction="batchmean"), ValueError, "reduction: got 'batchmean'"),
    "unknown backend": (lambda: sd(X, Y, 0.5, backend="gpu"), ValueError, "backend: got 'gpu'"),
    "backend of another device": (
        lambda: sd(X, Y, 0.5, backend="cuda"), NotImplementedError,
        "backend='cuda': serves CUDA tensors, not cpu"),
    "identity of probabilities": (
        lambda: sd(X, Y, 0.5, label_fn="identity"), ValueError, "goes with loss='mse' only"),
    "clip of probabilities": (
        lambda: sd(X, Y, 0.5, label_fn=ClipLabel(0.1)), ValueError, "goes with loss='mse' only"),
    "zero temperature": (
        lambda: sd(X, Y, 0.5, label_fn="softmax", temperature=0), ValueError, "temperature: got 0"),
    "negative temperature": (
        lambda: sd(X, Y, 0.5, label_fn="softmax", temperature=-1.0), ValueError, "temperature: got"),
    "temperature without softmax": (
        lambda: sd(X, Y, 0.5, temperature=2.0), ValueError, "only label_fn='softmax' has one"),
    "smoothing above one": (
        lambda: sd(X, Y, 0.5, label_smoothing=1.5), ValueError, "label_smoothing: got 1.5"),
    "smoothing of real targets": (
        lambda: sd(X, X, 0.5, loss="mse", label_smoothing=0.1), ValueError, "wants index labels"),
    "ignore_index of probabilities": (
        lambda: sd(X, P, 0.5, ignore_index=0), ValueError, "ignore_index: got 0"),
    "class_weight with mse": (
        lambda: sd(X, X, 0.5, loss="mse", class_weight=torch.rand(3)), ValueError,
        "class_weight: goes with"),
    "class_weight of another length": (
        lambda: sd(X, Y, 0.5, class_weight=torch.rand(4)), ValueError,
        r"class_weight: got shape \(4,\), wanted \(3,\)"),
    "row_weight of another length": (
        lambda: sd(X, Y, 0.5, row_weight=torch.rand(3)), ValueError,
        r"row_weight: got shape \(3,\), wanted \(4,\)"),
    "row_weight integers": (
        lambda: sd(X, Y, 0.5, row_weight=Y), TypeError, "row_weight: got int64"),
    "source of another shape": (
        lambda: sd(X, Y, 0.5, source=X[:, :2]), ValueError, r"source: got shape \(4, 2\)"),
    "source integers": (lambda: sd(X, Y, 0.5, source=X.long()), TypeError, "source: got int64"),
    "labels on another device": (
        lambda: sd(X, Y.to("meta"), 0.5), ValueError, "labels: is on meta, wanted cpu"),
    "source on another device": (
        lambda: sd(X, Y, 0.5, source=X.to("meta")), ValueError, "source: is on meta"),
    "ignore_index None": (lambda: sd(X, Y, 0.5, ignore_index=None), TypeError, "ignore_index: got NoneType"),
    "smoothing a string": (lambda: sd(X, Y, 0.5, label_smoothing="a"), ValueError, "label_smoothing: got 'a'"),
    "integer labels of one column": (
        lambda: sd(X[:, :1], Y, 0.5, loss="mse", label_fn=ClipLabel(0.1)), IndexError,
        r"row 1 is 1, wanted 0 <= label < 1 .*\(targets of a one-column regression are floats\)"),
    "sparse logits": (lambda: sd(X.to_sparse(), Y, 0.5), TypeError, "logits: got layout torch.sparse_coo, wanted"),
    "sparse source": (lambda: sd(X, Y, 0.5, source=X.to_sparse()), TypeError, "source: got layout torch.sparse_coo"),
    "temperature beyond float32": (
        lambda: sd(X, Y, 0.5, label_fn="softmax", temperature=1e39), ValueError, "temperature: got 1e\\+39"),
    "unknown row weight": (lambda: sd(X, Y, 0.5, row_weight="gc"), ValueError, "row_weight: got 'gc', wanted 'gce'"),
    "row weight no tensor": (lambda: sd(X, Y, 0.5, row_weight=[1.0]), TypeError, "row_weight: got list"),
    "gce of mse": (lambda: sd(X, X, 0.5, loss="mse", row_weight="gce"), ValueError, "row_weight: .* got loss='mse'"),
    "gce of probabilities": (lambda: sd(X, P, 0.5, row_weight="gce"), ValueError, "row_weight: .* wants index labels"),
    "gce of q 0": (lambda: sdfast.GeneralizedCrossEntropy(0), ValueError, r"q: got 0, wanted a number in \(0, 1\]"),
    "gce of q NaN": (lambda: sdfast.GeneralizedCrossEntropy(float("nan")), ValueError, "q: got nan"),
    "keep above one": (lambda: sdfast.SmallLoss(1.1), ValueError, r"keep: got 1.1, wanted a number in \(0, 1\]"),
    "small loss of other rows": (
        lambda: sd(X, Y, 0.5, row_weight=sdfast.SmallLoss(0.5, logits=X[:2])), ValueError,
        r"row_weight: got SmallLoss with logits \(2, 3\) on cpu, wanted \(4, 3\) on cpu"),
    "small loss of indices": (
        lambda: sd(X, Y, 0.5, row_weight=sdfast.SmallLoss(0.5, logits=Y)), TypeError, "row_weight: logits: got int64"),
    "prior of hardmax": (
        lambda: sd(X, Y, 0.5, source=sdfast.ClassPrior(P[0])), ValueError, "label_fn: got 'hardmax', but a ClassPrior"),
    "prior of other classes": (
        lambda: sd(X, Y, 0.5, source=sdfast.ClassPrior(torch.ones(2) / 2), label_fn="softmax"), ValueError,
        "source: got a ClassPrior of 2 classes on cpu, wanted 3 on cpu"),
    "prior no distribution": (
        lambda: sdfast.ClassPrior(torch.ones(3)), ValueError, "probabilities: got a least of 1 and a sum of 3"),
    "prior negative": (
        lambda: sdfast.ClassPrior(torch.tensor([1.5, -0.5])), ValueError, "probabilities: got a least of -0.5"),
    "prior NaN": (lambda: sdfast.ClassPrior(torch.tensor([0.5, torch.nan])), ValueError, "probabilities: got a least"),
    "prior of rows": (
        lambda: sdfast.ClassPrior(P), ValueError, r"probabilities: got shape \(4, 3\), wanted \(classes,\)"),
    "prior of counts": (lambda: sdfast.ClassPrior(Y), TypeError, "probabilities: got int64"),
    "unknown mixing": (lambda: sd(X, Y, 0.5, mixing="mean"), ValueError, "mixing: got 'mean', wanted one of"),
    "geometric hardmax": (
        lambda: sd(X, P, 0.5, mixing="geometric"), ValueError, "mixing: 'geometric' wants label_fn='softmax'"),
    "geometric one-hot": (
        lambda: sd(X, Y, 0.5, mixing="geometric", label_fn="softmax"), ValueError, "wants label_smoothing > 0, got 0"),
    "geometric mse": (
        lambda: sd(X, X, 0.5, mixing="geometric", label_fn="softmax", loss="mse"), ValueError,
        "mixing: 'geometric' wants targets that are probabilities"),
    "target temperature above one": (
        lambda: sd(X, Y, 0.5, target_temperature=2.0), ValueError, r"target_temperature: got 2.0, wanted .* \(0, 1\]"),
    "target temperature of mse": (
        lambda: sd(X, X, 0.5, loss="mse", target_temperature=0.5), ValueError, "target_temperature: 0.5 wants targets"),
    "huge alpha": (lambda: sd(X, Y, 10**400), TypeError, "alpha: got int"),
    "huge ratio": (lambda: AdaptiveAlpha(10**400), ValueError, "ratio: got 1000"),
    "negative ratio": (lambda: AdaptiveAlpha(-1.0), ValueError, "ratio: got -1.0"),
    "ratio no number": (lambda: AdaptiveAlpha("1"), ValueError, "ratio: got '1'"),
    "group without sync": (lambda: AdaptiveAlpha(1.0, group=object()), ValueError, "group: given without sync=True"),
    "rho of a half": (lambda: ClipLabel(0.5), ValueError, r"rho: got 0.5, wanted a number in \[0, 0.5\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named_in_one_line(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["reference", *backends(without=("cuda", "triton"))])
def test_values_are_checked_on_every_cpu_backend(backend):
    with pytest.raises(IndexError, match="labels: row 1 is 3, wanted 0 <= label < 3 or ignore_index=-100"):
        sd(X, Y + 2, 0.5, backend=backend)
    with pytest.raises(ValueError, match=r"alpha: row 2 is 2, wanted within \[0, 1\]"):
        sd(X, Y, torch.tensor([0.0, 1.0, 2.0, 0.0]), backend=backend)


def test_the_first_bad_row_is_named_whatever_the_threads():
    labels = torch.zeros(50_000, dtype=torch.int64)
    labels[[777, 40_000]] = 99
    with pytest.raises(IndexError, match="labels: row 777 is 99"):
        sd(torch.randn(50_000, 10), labels, 0.5)


def test_compiled_code_raises_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: sd(x, y, 0.5), fullgraph=True, backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError), match="labels: row 1 is 3"):
        compiled(X, Y + 2)


def test_numpy_scalars_are_numbers():
    import numpy as np

    given = sd(X, Y, np.float32(0.5), label_fn="softmax", temperature=np.float64(0.5), label_smoothing=np.float32(0.25))
    assert given == sd(X, Y, 0.5, label_fn="softmax", temperature=0.5, label_smoothing=0.25)


def test_public_names():
    assert set(sdfast.__all__) <= set(dir(sdfast))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        sdfast.nope  # noqa: B018
