"""Every bad input gets one line that names the argument, what came and what is wanted."""

import pytest
import torch
from helpers import backends

from sdfast import LogProbabilities, TopK
from sdfast import distillation_loss as kd

X = torch.randn(4, 3)
T = torch.randn(4, 3)
Y = torch.tensor([0, 1, 2, 0])
V = torch.full((4, 2), 0.4).log()
I = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])  # noqa: E741
M = torch.full((4,), 0.2)

BAD_CALLS = {
    "logits no tensor": (lambda: kd([[1.0]], T), TypeError, "logits: got list"),
    "integer logits": (lambda: kd(X.long(), T), TypeError, "logits: got int64, wanted float32"),
    "teacher missing": (lambda: kd(X, None), TypeError, "teacher_logits: got NoneType, wanted a tensor of logits"),
    "teacher of another width": (
        lambda: kd(X, T[:, :2]), ValueError, r"teacher_logits: got shape \(4, 2\), wanted \(4, 3\) as the logits"),
    "teacher integers": (lambda: kd(X, T.long()), TypeError, "teacher_logits: got int64"),
    "teacher on another device": (
        lambda: kd(X, T.to("meta")), ValueError, "teacher_logits: is on meta, wanted cpu as the logits"),
    "teacher sparse": (lambda: kd(X, T.to_sparse()), TypeError, "teacher_logits: got layout torch.sparse_coo"),
    "log-probabilities of another width": (
        lambda: kd(X, LogProbabilities(T[:, :2])), ValueError, r"values: got shape \(4, 2\), wanted \(4, 3\)"),
    "top-k wider than the classes": (
        lambda: kd(X, TopK(torch.zeros(4, 4), torch.zeros(4, 4).long())), ValueError,
        r"values: got shape \(4, 4\), wanted \(4, k\) with 1 <= k <= 3"),
    "top-k of no class": (
        lambda: kd(X, TopK(V[:, :0], I[:, :0])), ValueError, r"values: got shape \(4, 0\), wanted \(4, k\)"),
    "top-k of other rows": (lambda: kd(X, TopK(V[:3], I[:3])), ValueError, r"values: got shape \(3, 2\)"),
    "indices of another shape": (
        lambda: kd(X, TopK(V, I[:, :1])), ValueError, r"indices: got shape \(4, 1\), wanted \(4, 2\) as the values"),
    "indices floating": (lambda: kd(X, TopK(V, V)), TypeError, "indices: got float32, wanted int64 classes"),
    "indices out of range": (
        lambda: kd(X, TopK(V, I + 1)), IndexError, "indices: row 1 lists 3, wanted 0 <= index < 3"),
    "indices negative": (lambda: kd(X, TopK(V, I - 1)), IndexError, "indices: row 0 lists -1, wanted 0 <= index < 3"),
    "indices repeated": (
        lambda: kd(X, TopK(V, I.clone().index_fill_(0, torch.tensor(2), 1))), ValueError,
        "indices: row 2 lists 1 twice"),
    "tail mass above one": (
        lambda: kd(X, TopK(V, I, M * torch.tensor([1, 1, 9, 1]))), ValueError,
        r"tail_mass: row 2 is 1\.8, wanted within \[0, 1\]"),
    "tail mass negative": (
        lambda: kd(X, TopK(V, I, -M)), ValueError, r"tail_mass: row 0 is -0\.2, wanted within \[0, 1\]"),
    "probabilities for their logarithms": (
        lambda: kd(X, TopK(V.exp(), I)), ValueError, r"tail_mass: row 0 is -[\d.]+, wanted within \[0, 1\]"),
    "all classes and more than all of the mass": (
        lambda: kd(X, TopK(T.softmax(-1), torch.arange(3).expand(4, 3))), ValueError, "tail_mass: row 0 is -"),
    "tail mass NaN": (lambda: kd(X, TopK(V, I, M * torch.nan)), ValueError, r"tail_mass: row 0 is -?nan, wanted"),
    "tail mass of other rows": (
        lambda: kd(X, TopK(V, I, M[:3])), ValueError, r"tail_mass: got shape \(3,\), wanted \(4,\)"),
    "tail mass without a tail": (
        lambda: kd(X, TopK(T, Y[:, None].expand(4, 3), M)), ValueError, "tail_mass: given, but all 3 classes are"),
    "unknown tail": (lambda: kd(X, TopK(V, I, M, "drop")), ValueError, "tail: got 'drop', wanted one of 'bucket'"),
    "labels too large": (lambda: kd(X, T, Y + 2), IndexError, "labels: row 1 is 3, wanted 0 <= label < 3"),
    "labels negative": (lambda: kd(X, T, Y - 1), IndexError, "labels: row 0 is -1"),
    "labels too few": (lambda: kd(X, T, Y[:3]), ValueError, r"labels: got int64 of shape \(3,\)"),
    "labels bool": (lambda: kd(X, T, Y.bool()), TypeError, "labels: got bool"),
    "class-first logits": (
        lambda: kd(torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5), torch.zeros(2, 5, 5).long()), ValueError,
        r"class-first: wanted the classes last"),
    "alpha without labels": (lambda: kd(X, T, alpha=0.5), ValueError, "alpha: got 0.5, but there are no labels"),
    "alpha tensor without labels": (
        lambda: kd(X, T, alpha=M), ValueError, r"alpha: got a tensor of shape \(4,\), but there are no labels"),
    "alpha above one": (lambda: kd(X, T, Y, alpha=1.5), ValueError, r"alpha: got 1.5, wanted within \[0, 1\]"),
    "alpha NaN": (lambda: kd(X, T, Y, alpha=float("nan")), ValueError, "alpha: got nan"),
    "alpha string": (lambda: kd(X, T, Y, alpha="half"), TypeError, "alpha: got str, wanted a number or a tensor"),
    "alpha rows too few": (lambda: kd(X, T, Y, alpha=M[:3]), ValueError, r"alpha: got shape \(3,\), wanted \(4,\)"),
    "alpha tensor above one": (
        lambda: kd(X, T, Y, alpha=torch.tensor([0, 0.5, 1, 2])), ValueError, "alpha: row 3 is 2, wanted within"),
    "alpha that requires grad": (
        lambda: kd(X, T, Y, alpha=torch.tensor(0.5, requires_grad=True)), ValueError, "alpha: requires grad"),
    "zero temperature": (lambda: kd(X, T, temperature=0), ValueError, "temperature: got 0, wanted a number > 0"),
    "huge temperature": (lambda: kd(X, T, temperature=1e30), ValueError, r"temperature: got 1e\+30"),
    "teacher temperature negative": (
        lambda: kd(X, T, teacher_temperature=-1.0), ValueError, "teacher_temperature: got -1.0"),
    "temperature of probabilities": (
        lambda: kd(X, LogProbabilities(T), teacher_temperature=2.0), ValueError,
        "teacher_temperature: got 2.0, but only a teacher's logits have one"),
    "unknown divergence": (lambda: kd(X, T, divergence="jsd"), ValueError, "divergence: got 'jsd', wanted one of 'kl'"),
    "unknown reduction": (lambda: kd(X, T, reduction="batchmean"), ValueError, "reduction: got 'batchmean'"),
    "smoothing above one": (lambda: kd(X, T, Y, label_smoothing=1.5), ValueError, "label_smoothing: got 1.5"),
    "smoothing without labels": (
        lambda: kd(X, T, label_smoothing=0.1), ValueError, "label_smoothing: got 0.1, but there are no labels"),
    "ignore_index without labels": (
        lambda: kd(X, T, ignore_index=0), ValueError, "ignore_index: got 0, but there are no labels"),
    "ignore_index of probabilities": (
        lambda: kd(X, T, T.softmax(-1), ignore_index=0), ValueError, "ignore_index: got 0, but labels that are not"),
    "ignore_index None": (lambda: kd(X, T, Y, ignore_index=None), TypeError, "ignore_index: got NoneType"),
    "row_weight of another length": (
        lambda: kd(X, T, row_weight=M[:3]), ValueError, r"row_weight: got shape \(3,\), wanted \(4,\)"),
    "unknown backend": (lambda: kd(X, T, backend="gpu"), ValueError, "backend: got 'gpu'"),
    "a backend without this kernel": (
        lambda: kd(X, T, backend="cuda"), NotImplementedError, "backend='cuda': this operation has no such kernel"),
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
    for error, message, arguments in (
        (IndexError, "labels: row 1 is 3, wanted 0 <= label < 3 or ignore_index=-100", (T, Y + 2)),
        (IndexError, "indices: row 1 lists 3, wanted 0 <= index < 3", (TopK(V, I + 1),)),
        (ValueError, "indices: row 0 lists 0 twice", (TopK(V, I * 0),)),
        (ValueError, r"tail_mass: row 0 is 1.4, wanted within \[0, 1\]", (TopK(V, I, 7 * M),)),
    ):
        with pytest.raises(error, match=message):
            kd(X, *arguments, backend=backend)
    with pytest.raises(ValueError, match=r"alpha: row 3 is 2, wanted within \[0, 1\]"):
        kd(X, T, Y, alpha=torch.tensor([0.0, 0.5, 1.0, 2.0]), backend=backend)


@pytest.mark.parametrize("backend", ["reference", *backends(without=("cuda", "triton"))])
def test_what_an_ignored_row_lists_is_nobodys_concern(backend):
    labels = torch.tensor([0, -100, 2, 0])
    indices = I.clone()
    indices[1] = 77
    tail = M.clone()
    tail[1] = 5
    got = kd(X, TopK(V, indices, tail), labels, backend=backend)
    assert torch.equal(got, kd(X, TopK(V, I, M), labels, backend=backend))


def test_compiled_code_raises_too():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t, y: kd(x, t, y), fullgraph=True, backend="aot_eager")
    with pytest.raises((IndexError, RuntimeError), match="labels: row 1 is 3"):
        compiled(X, T, Y + 2)
