"""Every backend against the float64 reference: loss and gradient, over all options, teachers and awkward inputs."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from distillation_cases import DIVERGENCES, FORMS, Case, cast_teacher, draw_case, make_teacher
from helpers import (
    DTYPES,
    LAYOUTS,
    assert_as_good_as_torch,
    awkward,
    backends,
    interpreted,
    skip_what_takes_the_interpreter_minutes,
)

import sdfast
from sdfast import distillation_loss

BACKENDS = backends(without=("cuda",))


def loss_and_gradient(backend, logits, *arguments, **options):
    x = logits.detach().requires_grad_()
    loss = distillation_loss(x, *arguments, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_matches_the_reference(backend):
    @hypothesis.settings(max_examples=60 if backend == "triton" else 400, deadline=None, derandomize=False)
    @hypothesis.given(st.integers(0, 2**31))
    def check(seed):
        draw_case(seed).check(backend)

    check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_is_the_formula(divergence, form):
    """Written out once more with torch's own losses."""
    logits, teacher_logits = torch.randn(2, 6, 7, dtype=torch.float64).unbind()
    labels = torch.randint(0, 7, (6,))
    labels[2] = -100
    teacher = make_teacher(teacher_logits, form, temperature=2.0)
    log_p = (logits / 2).log_softmax(-1)
    log_q = (teacher_logits / 2).log_softmax(-1)
    if form == "bucket":
        others = torch.ones(6, 7, dtype=torch.bool).scatter(-1, teacher.indices, False)

        def bucketed(log):  # the three listed classes, and one for all others
            listed = log.gather(-1, teacher.indices)
            return torch.cat([listed, log.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)], -1)

        log_p, log_q = bucketed(log_p), bucketed(log_q)
    elif form == "uniform":
        q = torch.full_like(log_q, torch.nan)
        tail = 1 - teacher.values.exp().sum(-1, keepdim=True)
        log_q = (tail / 4).log().expand_as(q).scatter(-1, teacher.indices, teacher.values)
    m = ((log_p.exp() + log_q.exp()) / 2).log()

    def kl(log_a, log_b):
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    distance = {"kl": kl(log_q, log_p), "reverse_kl": kl(log_p, log_q), "js": (kl(log_q, m) + kl(log_p, m)) / 2}
    rows = 0.3 * F.cross_entropy(logits, labels, reduction="none") + 0.7 * 4 * distance[divergence]
    options = {"alpha": 0.3, "temperature": 2.0, "divergence": divergence}
    got = distillation_loss(logits, teacher, labels, backend="reference", **options)
    torch.testing.assert_close(got, rows[labels != -100].mean())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_bucket_gradients_are_those_of_the_bucketed_outcomes(backend, divergence):
    """The detached share makes value and gradient exactly those of k + 1 outcomes."""
    logits, teacher_logits = (3 * torch.randn(2, 5, 20, dtype=torch.float64)).unbind()
    teacher = make_teacher(teacher_logits, "bucket", k=4)
    x, z = (logits.clone().requires_grad_() for _ in range(2))
    log_p = z.log_softmax(-1)
    listed = torch.zeros(5, 20, dtype=torch.bool).scatter(-1, teacher.indices, True)
    rest = log_p.masked_fill(listed, -torch.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_p.gather(-1, teacher.indices), rest], -1)
    log_q = torch.cat([teacher.values, (1 - teacher.values.exp().sum(-1, keepdim=True)).log()], -1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    forward = (log_q.exp() * (log_q - log_p)).sum(-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    js = ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2
    want = {"kl": forward, "reverse_kl": reverse, "js": js}[divergence].mean()
    got = distillation_loss(x, teacher, temperature=1.0, divergence=divergence, backend=backend)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*torch.autograd.grad([got, want], [x, z]))


# 1: one entry; 3, 10: less than a vector and a half; 1000: many; 9001: several tiles; then vocabularies.
@pytest.mark.parametrize("classes", [1, 3, 10, 1000, 9001, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, dtype, classes):
    few = classes > 10_000 and interpreted(backend)  # one dtype and the logits of a teacher are enough of it there
    skip_what_takes_the_interpreter_minutes(backend, few and dtype != torch.float32)
    for divergence in DIVERGENCES:
        for form in FORMS[:1] if few else FORMS:
            logits, teacher = (3 * torch.randn(2, 3, classes, dtype=torch.float64)).unbind()
            given = make_teacher(teacher, form, 5)
            options = {"divergence": divergence, "temperature": 2.0}
            Case(logits, given, torch.randint(0, classes, (3,)), options, dtype, dtype).check(backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_student_and_teacher_of_any_two_dtypes(backend, dtype, teacher_dtype, layout):
    logits, teacher = (3 * torch.randn(2, 4, 21, dtype=torch.float64)).unbind()
    options = {"temperature": 2.0, "teacher_temperature": 3.0}
    Case(logits, teacher, torch.randint(0, 21, (4,)), options, dtype, teacher_dtype, layout).check(backend)
    Case(logits, make_teacher(teacher, "bucket", 5), None, {"divergence": "js"}, dtype, teacher_dtype, layout).check(
        backend
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_rows(backend, dtype, divergence):
    """p → 1 where the teacher's is, where it is not, and a tie; the same for the teacher."""
    logits = torch.full((4, 50), -20.0, dtype=torch.float64)
    teacher = logits.clone()
    logits[0, 7] = teacher[0, 7] = logits[1, 3] = teacher[1, 7] = 20.0
    logits[2, [4, 9]] = teacher[3, [1, 2]] = 20.0
    for form in FORMS:
        given = make_teacher(teacher, form)
        if form == "uniform":  # a tail of exactly 0 makes the reverse divergence infinite: tested below
            given = given._replace(tail_mass=torch.full((4,), 1e-3, dtype=torch.float64))
        options = {"divergence": divergence, "temperature": 1.0}
        Case(logits, given, torch.tensor([7, 7, 9, 0]), options, dtype, torch.float64).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_true_class_gradient_of_a_confident_row(backend):
    """Within 0.5 % at p = 0.999 in bfloat16, where 1 - p computed from a rounded p would be wrong by 100 %."""
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    logits[0, 0] = 6.90625  # p = 0.999, exact in bfloat16
    exact = logits.double().softmax(-1)[0, 0] - 1
    _, hard = loss_and_gradient(backend, logits, torch.zeros(1, 2), torch.tensor([0]), alpha=1.0)
    assert hard[0, 0].double() == pytest.approx(exact.item(), rel=5e-3)
    sure = torch.tensor([[0.0, -torch.inf]])  # a teacher that knows: KL's gradient is the same
    _, soft = loss_and_gradient(backend, logits, sure, temperature=1.0)
    assert soft[0, 0].double() == pytest.approx(exact.item(), rel=5e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [10, 1000, 50257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_bfloat16_inputs_are_those_of_float64(backend, classes, divergence):
    """Within 0.5 %, over the row and at each entry that matters: no probability is ever rounded to bfloat16."""
    skip_what_takes_the_interpreter_minutes(backend, classes > 10_000)
    logits, teacher = (4 * torch.randn(2, 6, classes)).bfloat16().unbind()
    options = {"divergence": divergence, "temperature": 1.0, "reduction": "sum"}
    _, got = loss_and_gradient(backend, logits, teacher, **options)
    _, exact = loss_and_gradient("reference", logits.double(), teacher.double(), **options)
    error = got.double() - exact
    ulp = 2 if interpreted(backend) else 1  # it truncates its bfloat16 stores
    assert (error.norm(dim=-1) / exact.norm(dim=-1)).max() < 5e-3 * ulp
    large = exact.abs() > 1e-2 * exact.abs().amax(-1, keepdim=True)
    assert (error.abs() / exact.abs())[large].max() < 5e-3 * ulp


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_common_offset_of_the_logits_changes_nothing(backend, divergence):
    logits, teacher = ((3 * torch.randn(2, 5, 300)) * 64).round().div(64).unbind()  # 1e4 more is exact in float32
    labels = torch.randint(0, 300, (5,))
    options = {"divergence": divergence, "temperature": 2.0}
    plain = loss_and_gradient(backend, logits, teacher, labels, **options)
    moved = loss_and_gradient(backend, logits + 1e4, teacher - 1e4, labels, **options)
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_classes_add_nothing(backend, divergence):
    """-inf at the same classes of both: the loss and gradient of the classes that are left."""
    logits, teacher = (2 * torch.randn(2, 4, 12, dtype=torch.float64)).unbind()
    labels = torch.randint(0, 8, (4,))
    options = {"divergence": divergence, "temperature": 2.0}
    want = loss_and_gradient(backend, logits[:, :8], teacher[:, :8], labels, **options)
    logits, teacher = logits.clone(), teacher.clone()
    logits[:, 8:] = teacher[:, 8:] = -torch.inf
    got = loss_and_gradient(backend, logits, teacher, labels, **options)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:, :8], want[1])
    assert (got[1][:, 8:] == 0).all()
    probabilities = sdfast.LogProbabilities((teacher / 2).log_softmax(-1))
    torch.testing.assert_close(loss_and_gradient(backend, logits, probabilities, labels, **options), got)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_impossible_class_makes_an_infinite_loss_where_it_should(backend):
    one, other = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.zeros(1, 3)
    for student, teacher, infinite in ((one, other, "kl"), (other, one, "reverse_kl")):
        for divergence in DIVERGENCES:
            loss = distillation_loss(student, teacher, divergence=divergence, backend=backend)
            assert loss.isinf().item() == (divergence == infinite), divergence
            assert loss > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_rows_are_what_the_reference_makes_of_them(backend, divergence, bad):
    logits, teacher = torch.randn(2, 6, 40).unbind()
    logits, teacher = logits.clone(), teacher.clone()
    logits[0, 3] = teacher[1, 3] = torch.nan
    logits[2], teacher[3] = bad, bad
    labels = torch.tensor([3, 3, 3, 3, 0, -100])
    logits[5] = teacher[5] = torch.nan
    for given in (None, labels):
        options = {"divergence": divergence, "reduction": "none"}
        got = loss_and_gradient(backend, logits, teacher, given, **options)
        want = loss_and_gradient("reference", logits, teacher, given, **options)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert got[0].isnan()[:4].all()
        assert got[0].isfinite()[4]
        assert got[0].isnan()[5] == (given is None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [3, 40, 9000])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(backend, divergence, classes):
    """Exactly 0: both sides are computed by the same operations in the same order."""
    for dtype in DTYPES:
        for temperature in (1.0, 0.7, 4.0):
            logits = (5 * torch.randn(1 if interpreted(backend) else 3, classes)).to(dtype)
            options = {"divergence": divergence, "temperature": temperature}
            loss, gradient = loss_and_gradient(backend, logits, logits.clone(), **options)
            assert loss == 0
            assert (gradient == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_gradients_sum_to_zero(backend, divergence, form):
    logits, teacher = (3 * torch.randn(2, 20, 77)).unbind()
    given = make_teacher(teacher, form)
    _, gradient = loss_and_gradient(
        backend, logits, given, torch.randint(0, 77, (20,)), divergence=divergence, label_smoothing=0.1
    )
    assert gradient.sum(-1).abs().max() < 5e-7


@pytest.mark.parametrize("classes", [10, 33, 130, 9000])  # rows that share vectors, in registers, in chunks
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_one_is_the_plain_loss_bit_for_bit(backend, dtype, classes):
    """Loss and gradient of `self_distillation_loss` at α = 1, whatever the teacher: it is not looked at."""
    rows = 3 if interpreted(backend) and classes > 1000 else 21  # there each is a program of its own
    logits = (3 * torch.randn(rows, classes)).to(dtype)
    labels = torch.randint(0, classes, (rows,))
    labels[rows // 7] = -100
    teacher = torch.full((rows, classes), torch.nan)
    mixed = torch.where(torch.arange(rows) % 2 == 0, 1.0, 0.5).to(torch.float64 if dtype == torch.float64 else None)
    for soft in (labels, torch.rand(rows, classes).softmax(-1)):
        for smoothing in (0.0, 0.1):
            x = logits.clone().requires_grad_()
            plain = sdfast.self_distillation_loss(
                x, soft, 1.0, label_smoothing=smoothing, reduction="none", backend=backend
            )
            (wanted,) = torch.autograd.grad(plain.sum(), x)
            for alpha in (1.0, torch.ones_like(plain), mixed):
                loss, gradient = loss_and_gradient(
                    backend, logits, teacher, soft, alpha=alpha, label_smoothing=smoothing, reduction="none"
                )
                same = slice(None, None, 2) if alpha is mixed else slice(None)
                assert torch.equal(loss[same], plain[same].detach())
                assert torch.equal(gradient[same], wanted[same])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_alpha_one_is_torchs_cross_entropy(backend, reduction):
    logits, labels = torch.randn(30, 25), torch.randint(0, 25, (30,))
    labels[::7] = 255
    options = {"ignore_index": 255, "label_smoothing": 0.1, "reduction": reduction}
    x, z = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = distillation_loss(x, torch.zeros(30, 25), labels, alpha=1.0, backend=backend, **options)
    exact = F.cross_entropy(z, labels, **options)
    single = F.cross_entropy(logits, labels, **options)
    assert_as_good_as_torch("loss", got, single, exact)
    torch.testing.assert_close(*[g.float() for g in torch.autograd.grad([got.sum(), exact.sum()], [x, z])])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_mean_is_over_rows_not_entries(backend):
    logits, teacher = torch.randn(2, 6, 9).unbind()
    got = distillation_loss(logits, teacher, temperature=2.0, backend=backend)
    log_p, q = (logits / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(got, 4 * F.kl_div(log_p, q, reduction="batchmean"))
    labels = torch.tensor([1, -100, 2, -100, -100, 3])
    losses = distillation_loss(logits, teacher, labels, reduction="none", backend=backend)
    assert (losses[[1, 3, 4]] == 0).all()
    torch.testing.assert_close(distillation_loss(logits, teacher, labels, backend=backend), losses.sum() / 3)
    weight = torch.rand(6)
    weighted = distillation_loss(logits, teacher, labels, row_weight=weight, backend=backend)
    torch.testing.assert_close(weighted, (losses * weight).sum() / 3)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_alpha_none_is_a_half_with_labels_and_nothing_without(backend):
    logits, teacher, labels = torch.randn(6, 9), torch.randn(6, 9), torch.randint(0, 9, (6,))
    half = distillation_loss(logits, teacher, labels, alpha=0.5, backend=backend)
    assert torch.equal(distillation_loss(logits, teacher, labels, backend=backend), half)
    hard = distillation_loss(logits, teacher, labels, alpha=1.0, backend=backend)
    soft = distillation_loss(logits, teacher, backend=backend)
    torch.testing.assert_close(half, (hard + soft) / 2)
    assert torch.equal(distillation_loss(logits, teacher, labels, alpha=0.0, backend=backend), soft)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_log_probabilities_are_logits_at_temperature_one(backend):
    logits, teacher = torch.randn(2, 6, 9).unbind()
    log_q = teacher.log_softmax(-1)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "temperature": 1.0, "backend": backend}
        want = distillation_loss(logits, teacher, **options)
        for given in (log_q, sdfast.LogProbabilities(log_q), sdfast.TopK(log_q, torch.arange(9).expand(6, 9))):
            torch.testing.assert_close(distillation_loss(logits, given, **options), want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_student_keeps_the_mass_of_its_tail(backend, divergence):
    """1 − (listed mass) would be 0 in float32 at a tail of 1e-12, and the loss infinite or wrong by a lot."""
    logits = torch.full((1, 30), -30.0, dtype=torch.float64)
    logits[0, :2] = torch.tensor([0.0, -1.0])
    tail_mass = torch.tensor([0.05], dtype=torch.float64)
    values = torch.tensor([[0.6, 0.35]], dtype=torch.float64).log()
    teacher = sdfast.TopK(values, torch.tensor([[0, 1]]), tail_mass)
    options = {"divergence": divergence, "temperature": 1.0}
    exact = loss_and_gradient("reference", logits, teacher, **options)
    got = loss_and_gradient(backend, logits.float(), cast_teacher(teacher, torch.float32), **options)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_teacher_without_tail(backend):
    """Mass 0: KL only asks for the listed classes; reverse KL forbids all others."""
    logits = torch.randn(3, 8, dtype=torch.float64)
    values = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log().expand(3, 2)
    for tail in ("bucket", "uniform"):
        teacher = sdfast.TopK(values, torch.tensor([[2, 5]]).expand(3, 2), torch.zeros(3, dtype=torch.float64), tail)
        got = loss_and_gradient(backend, logits, teacher, temperature=1.0)
        dense = torch.zeros(3, 8, dtype=torch.float64)
        dense[:, [2, 5]] = 0.5
        want = loss_and_gradient(backend, logits, sdfast.LogProbabilities(dense.log()), temperature=1.0)
        torch.testing.assert_close(got, want)
        assert distillation_loss(logits, teacher, divergence="reverse_kl", backend=backend) == torch.inf


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_kept_gives_zero(backend, reduction):
    for rows in (0, 5):
        labels = torch.full((rows,), -100)
        loss, gradient = loss_and_gradient(
            backend, torch.randn(rows, 7), torch.full((rows, 7), torch.nan), labels, reduction=reduction
        )
        assert (loss == 0).all()
        assert (gradient == 0).all()
    assert distillation_loss(torch.randn(0, 7), torch.rand(0, 7), backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_one_a_row(backend):
    logits, teacher = torch.randn(2, 12, 7).unbind()
    logits.requires_grad_()
    labels = torch.randint(0, 7, (12,))
    rows = (torch.randn(12), torch.zeros(12), torch.ones(1).expand(12), torch.randn(24)[::2])
    scalars = (torch.tensor(1.0), torch.tensor(-3.5), torch.tensor(0.0), torch.tensor(65536.0))
    for reduction, upstreams in (("none", rows), ("mean", scalars), ("sum", scalars)):
        for upstream in upstreams:
            results = [
                torch.autograd.grad(
                    distillation_loss(logits, teacher, labels, reduction=reduction, backend=which), logits, upstream
                )[0]
                for which in (backend, "reference")
            ]
            unit = upstream.abs().max().clamp(min=1)
            torch.testing.assert_close(results[0] / unit, results[1] / unit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend):
    logits, teacher = torch.randn(2, 2, 3, 4, 6).unbind()
    labels, weight, alpha = torch.randint(0, 6, (2, 3, 4)), *torch.rand(2, 2, 3, 4).unbind()
    for form in FORMS:
        given = make_teacher(teacher, form)
        flat = type(given)(*[t.flatten(0, 2) if isinstance(t, torch.Tensor) else t for t in given]) if isinstance(
            given, tuple) else given.flatten(0, 2)  # fmt: skip
        loss = distillation_loss(
            logits, given, labels, alpha=alpha, row_weight=weight, reduction="none", backend=backend
        )
        want = distillation_loss(
            logits.flatten(0, 2), flat, labels.flatten(), alpha=alpha.flatten(), row_weight=weight.flatten(),
            reduction="none", backend=backend,
        )  # fmt: skip
        assert torch.equal(loss, want.reshape(2, 3, 4))
    one = distillation_loss(logits[0, 0, 0], teacher[0, 0, 0], labels[0, 0, 0], reduction="none", backend=backend)
    assert one.shape == ()
    int32 = distillation_loss(logits, teacher, labels.to(torch.int32), backend=backend)
    assert torch.equal(int32, distillation_loss(logits, teacher, labels, backend=backend))


@pytest.mark.parametrize("classes", [10, 130, 40000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch_and_repeats_bit_for_bit(backend, classes):
    """Also not on the number of threads, and not on whether a row or its columns are shared among them."""
    skip_what_takes_the_interpreter_minutes(backend, classes > 10_000)
    rows = 70 if classes < 1000 else 5
    logits, teacher = (4 * torch.randn(2, rows, classes)).unbind()
    labels = torch.randint(0, classes, (rows,))
    threads = torch.get_num_threads()
    for divergence in DIVERGENCES:

        def run(x, t, y, divergence=divergence):
            return loss_and_gradient(backend, x, t, y, alpha=0.4, reduction="none", divergence=divergence)

        loss, gradient = run(logits, teacher, labels)
        try:
            for count in (1,) if interpreted(backend) else (1, 2, 5):
                torch.set_num_threads(count)
                again = run(logits, teacher, labels)
                assert torch.equal(again[0], loss)
                assert torch.equal(again[1], gradient)
                for i in (0, rows - 1):
                    alone = run(logits[i : i + 1], teacher[i : i + 1], labels[i : i + 1])
                    assert torch.equal(alone[0], loss[i : i + 1])
                    assert torch.equal(alone[1], gradient[i : i + 1])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_grid_axis(backend):
    logits, teacher = torch.randn(2, 70_000, 3).unbind()
    labels = torch.randint(0, 3, (70_000,))
    for reduction in ("mean",) if interpreted(backend) else ("none", "mean"):
        got = loss_and_gradient(backend, logits, teacher, labels, reduction=reduction)
        want = loss_and_gradient("reference", logits, teacher, labels, reduction=reduction)
        torch.testing.assert_close(got[0], want[0])
        # A mean's gradients are a 70,000th: compared as those of the rows themselves.
        scale = 70_000 if reduction == "mean" else 1
        torch.testing.assert_close(scale * got[1], scale * want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_beyond_32_bit_offsets(backend):
    """Row strides that put the last row past 2³¹ entries: rows are views into one buffer of untouched pages."""
    classes, rows = 8, 3
    stride = 2**30 + 5
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all 4 GiB
    storage = torch.empty(2 * stride + 2 * classes, dtype=torch.bfloat16)
    logits, teacher = (storage.as_strided((rows, classes), (stride, 1), offset) for offset in (0, classes))
    values = torch.randn(2, rows, classes).bfloat16()
    for i in range(rows):
        logits[i], teacher[i] = values[0, i], values[1, i]
    got = distillation_loss(logits, teacher, torch.randint(0, classes, (1,)).expand(rows), alpha=0.0, backend=backend)
    assert torch.equal(got, distillation_loss(values[0], values[1], backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    row, teacher, labels = torch.randn(1, 12), torch.randn(1, 12), torch.randint(0, 12, (6,))
    got = loss_and_gradient(backend, row.expand(6, 12), teacher.expand(6, 12), labels)
    want = loss_and_gradient(backend, row.repeat(6, 1), teacher.repeat(6, 1), labels)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_micro_batches_are_one_batch(backend):
    """Summed over micro-batches and divided once by the rows of all, the gradient is the batch's mean."""
    logits, teacher = torch.randn(2, 32, 19, dtype=torch.float64).unbind()
    labels = torch.randint(0, 19, (32,))
    _, whole = loss_and_gradient(backend, logits, teacher, labels)
    x = logits.clone().requires_grad_()
    for part, t, y in zip(x.chunk(4), teacher.chunk(4), labels.chunk(4), strict=True):
        (distillation_loss(part, t, y, reduction="sum", backend=backend) / 32).backward()
    torch.testing.assert_close(x.grad, whole)


def test_a_peculiar_layout_of_the_teacher_is_read_right():
    logits, teacher = torch.randn(2, 5, 9).unbind()
    plain = distillation_loss(logits, teacher)
    for layout in LAYOUTS:
        assert torch.equal(distillation_loss(logits, awkward(teacher, layout)), plain)
