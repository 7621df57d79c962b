"""Every backend against the float64 reference: loss, gradient and statistics, over all options and awkward inputs."""

import dataclasses
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, assert_as_good_as_torch, awkward, backends, poison, random_numbers

import sdfast
from sdfast import self_distillation_loss

BACKENDS = backends()
PROBABILITY_LOSSES = ("cross_entropy", "kl", "brier")


@dataclasses.dataclass(repr=False)
class Case:
    """One call: float64 tensors, given to each backend in `dtype` and `layout`."""

    logits: torch.Tensor
    labels: torch.Tensor
    alpha: object
    options: dict
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"

    def __repr__(self):
        shown = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        alpha = tuple(self.alpha.shape) if isinstance(self.alpha, torch.Tensor) else self.alpha
        labels = f"{self.labels.dtype}{tuple(self.labels.shape)}"
        return f"{tuple(self.logits.shape)} {self.dtype} {self.layout}, labels {labels}, alpha {alpha}, {shown}"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis asks for
        printer.text(repr(self))

    def run(self, backend, dtype):
        """(loss, gradient, stats) of the values that `self.dtype` can hold, computed in `dtype`."""
        options = dict(self.options)
        held = self.logits.to(self.dtype)
        logits = awkward(held.to(dtype), self.layout).detach().requires_grad_()
        poison(logits)
        if options.get("source") is not None:
            options["source"] = awkward(options["source"].to(self.dtype).to(dtype), self.layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the no-op trap has its own test
            loss, stats = self_distillation_loss(
                logits, self.labels, self.alpha, return_stats=True, backend=backend, **options
            )
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        return loss, gradient, stats

    def check(self, backend):
        got, torch_result, exact = self.run(backend, self.dtype), self.run("reference", self.dtype), None
        exact = self.run("reference", torch.float64)
        summed = self.options.get("reduction") == "sum"  # the target's own rounding moves each row's divergence
        assert_as_good_as_torch("loss", got[0], torch_result[0], exact[0], max(1, len(self.logits)) if summed else 1)
        unit = 1.0 if self.options.get("reduction") in ("sum", "none") else 1.0 / max(1, len(self.logits))
        assert_as_good_as_torch("gradient", got[1], torch_result[1], exact[1], unit)
        for name, g, t, e in zip(sdfast.LossStats._fields, got[2], torch_result[2], exact[2], strict=True):
            assert_as_good_as_torch(name, g, t, e)


@st.composite
def cases(draw):
    rows, classes = draw(st.sampled_from((0, 1, 2, 5, 40))), draw(st.sampled_from((1, 2, 3, 10, 16, 33, 129, 1000)))
    seed = draw(st.integers(0, 2**31))
    generator = random_numbers(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    loss = draw(st.sampled_from((*PROBABILITY_LOSSES, "mse")))
    label_fn = draw(st.sampled_from(("softmax", "hardmax") + (("identity", "clip") if loss == "mse" else ())))
    options = {
        "loss": loss,
        "label_fn": sdfast.ClipLabel(0.2) if label_fn == "clip" else label_fn,
        "temperature": draw(st.sampled_from((1.0, 0.5, 4.0))) if label_fn == "softmax" else 1.0,
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "source": 3 * normal(rows, classes) if draw(st.booleans()) else None,
        "row_weight": uniform(rows) if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        labels = torch.randint(0, classes, (rows,), generator=generator)
        labels[uniform(rows) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -100
        options["label_smoothing"] = draw(st.sampled_from((0.0, 0.1)))
    elif loss == "mse":
        labels = normal(rows, classes)
    else:
        labels = (2 * normal(rows, classes)).softmax(-1)
        options["label_smoothing"] = draw(st.sampled_from((0.0, 0.1)))
    if loss in ("cross_entropy", "kl") and draw(st.booleans()):
        options["class_weight"] = uniform(classes) + 0.1
    if loss != "mse":
        options["target_temperature"] = draw(st.sampled_from((1.0, 1.0, 0.5)))
        if label_fn == "softmax" and (labels.dim() == 2 or options["label_smoothing"]):
            options["mixing"] = draw(st.sampled_from(("arithmetic", "geometric")))
        if labels.dim() == 1 and options["row_weight"] is None and draw(st.booleans()):
            options["row_weight"] = sdfast.GeneralizedCrossEntropy(draw(st.sampled_from((0.3, 0.7, 1.0))))
    alpha = draw(st.sampled_from((0.0, 0.3, 1.0, uniform(rows), uniform(1)[0], sdfast.AdaptiveAlpha(0.9))))
    spread = draw(st.sampled_from((1.0, 8.0)))
    return Case(
        spread * normal(rows, classes), labels, alpha, options, draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_matches_the_reference(backend):
    examples = 80 if backend == "triton" else 400  # Triton compiles nearly every one anew

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=False)
    @hypothesis.given(cases())
    def check(case):
        case.check(backend)

    check()


# 1: one entry; 3, 10: less than a vector and a half; 1000: many; 50257, 151936: the vocabularies of language models.
@pytest.mark.parametrize("classes", [1, 3, 10, 1000, 50257, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, dtype, classes):
    for label_fn in ("hardmax", "softmax"):
        labels = torch.randint(0, classes, (3,))
        options = {"label_fn": label_fn, "temperature": 0.5 if label_fn == "softmax" else 1.0}
        Case(5 * torch.randn(3, classes, dtype=torch.float64), labels, 0.4, options, dtype).check(backend)


@pytest.mark.parametrize("loss", PROBABILITY_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_saturated_rows(backend, dtype, loss):
    """p -> 1 at the right class, at a wrong one, and a tie."""
    logits = torch.full((3, 50), -20.0, dtype=torch.float64)
    logits[0, 7] = logits[1, 3] = 20.0
    logits[2, [4, 9]] = 20.0
    for options in ({"label_fn": "hardmax"}, {"label_fn": "softmax", "temperature": 0.5}):
        Case(logits, torch.tensor([7, 7, 9]), 0.6, {"loss": loss, **options}, dtype).check(backend)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_classes_add_nothing(backend, loss):
    """-inf logits at classes without target mass: finite loss, zero gradient there; with target mass: infinite loss."""
    logits = torch.randn(4, 12, dtype=torch.float64)
    logits[:, 8:] = -torch.inf
    labels = torch.randint(0, 8, (4,))
    for options in ({}, {"label_fn": "softmax", "temperature": 0.7}):
        x = logits.clone().requires_grad_()
        out = self_distillation_loss(x, labels, 0.5, loss=loss, backend=backend, **options)
        out.backward()
        kept = logits[:, :8].clone().requires_grad_()
        expected = self_distillation_loss(kept, labels, 0.5, loss=loss, backend="reference", **options)
        expected.backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(x.grad[:, :8], kept.grad)
        assert (x.grad[:, 8:] == 0).all()
    assert self_distillation_loss(logits, torch.full((4,), 9), 1.0, loss=loss, backend=backend) == torch.inf
    # A class weight of 0 takes a class out as well as a target of 0 does.
    weight = (torch.arange(12) < 8).double()
    probabilities = torch.rand(4, 12, dtype=torch.float64).softmax(-1)
    for given in (probabilities, labels):
        out = self_distillation_loss(
            logits, given, 0.5, loss=loss, class_weight=weight, label_smoothing=0.1, backend=backend
        )
        assert out.isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_non_finite_logits_give_what_torch_gives(backend, dtype, bad):
    logits = torch.randn(5, 40).to(dtype)
    logits[1, 3] = bad
    logits[2, :] = bad
    labels = torch.tensor([0, 3, 5, 7, 9])
    got = self_distillation_loss(logits, labels, 1.0, reduction="none", backend=backend)
    want = F.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(got.float(), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    if bad == torch.inf or bad != bad:
        hard = self_distillation_loss(logits, labels, 0.5, reduction="none", backend=backend)
        assert hard.isnan().tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_an_ignored_row_goes_nowhere(backend):
    logits = torch.randn(3, 9)
    logits[1] = torch.nan
    logits.requires_grad_()
    loss = self_distillation_loss(logits, torch.tensor([1, -100, 2]), sdfast.AdaptiveAlpha(1.0), backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_alpha_one_is_cross_entropy(backend, dtype, reduction):
    logits = torch.randn(30, 25, dtype=torch.float64)
    labels = torch.randint(0, 25, (30,))
    labels[::7] = 255
    weight = torch.rand(25, dtype=torch.float64)
    for options in ({}, {"label_smoothing": 0.2}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.1}):
        ours = {("class_weight" if k == "weight" else k): v for k, v in options.items()}
        results = []
        for compute, torch_options in ((dtype, options), (torch.float64, options)):
            x = logits.to(dtype).to(compute).requires_grad_()
            promoted = x.float() if compute in (torch.bfloat16, torch.float16) else x
            cast = {k: v.to(promoted.dtype) if k == "weight" else v for k, v in torch_options.items()}
            out = F.cross_entropy(promoted, labels, ignore_index=255, reduction=reduction, **cast)
            out.sum().backward()
            results.append((out, x.grad))
        x = logits.to(dtype).requires_grad_()
        out = self_distillation_loss(x, labels, 1.0, ignore_index=255, reduction=reduction, backend=backend, **ours)
        out.sum().backward()
        assert_as_good_as_torch("loss", out, results[0][0], results[1][0])
        assert_as_good_as_torch("gradient", x.grad, results[0][1], results[1][1], unit=1 / 30)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_alpha_one_is_mse(backend):
    logits, targets = torch.randn(2, 30, 25, dtype=torch.float64).unbind()
    for reduction in ("mean", "sum"):
        x, z = (logits.clone().requires_grad_() for _ in range(2))
        ours = self_distillation_loss(x, targets, 1.0, loss="mse", reduction=reduction, backend=backend)
        # A row is the mean over its classes, so only `mean` is torch's; `sum` is its sum over C.
        theirs = F.mse_loss(z, targets, reduction=reduction) / (1 if reduction == "mean" else 25)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*torch.autograd.grad([ours, theirs], [x, z]))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_alpha_outside_the_unit_interval_is_theory_with_mse(backend):
    logits, targets = torch.randn(2, 8, 5, dtype=torch.float64).unbind()
    for alpha in (-4.3, 1.9):
        got = self_distillation_loss(logits, targets, alpha, loss="mse", label_fn="identity", backend=backend)
        want = F.mse_loss(logits, alpha * targets + (1 - alpha) * logits)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_softmax_at_temperature_one_is_a_no_op(backend):
    """The algebra of the docstring's note: alpha times the plain gradient."""
    logits = torch.randn(9, 6, dtype=torch.float64)
    labels = torch.randint(0, 6, (9,))
    for loss in PROBABILITY_LOSSES:
        gradients = []
        for alpha, label_fn in ((1.0, "hardmax"), (0.3, "softmax")):
            x = logits.clone().requires_grad_()
            self_distillation_loss(x, labels, alpha, label_fn=label_fn, loss=loss, backend=backend).backward()
            gradients.append(x.grad)
        torch.testing.assert_close(gradients[1], 0.3 * gradients[0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ties_go_to_the_first_index(backend):
    logits = torch.zeros(2, 40)
    logits[1, [17, 33]] = 1.0
    loss = self_distillation_loss(logits, torch.tensor([0, 17]), 0.0, reduction="none", backend=backend)
    want = F.cross_entropy(logits, torch.tensor([0, 17]), reduction="none")
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_uniform_target_has_its_largest_entry_first(backend):
    labels = torch.tensor([0, 1, 2, 0])
    _, stats = self_distillation_loss(
        torch.randn(4, 5), labels, 1.0, label_smoothing=1.0, return_stats=True, backend=backend
    )
    assert stats.agreement == 0.5


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_adaptive_alpha_follows_the_accuracy(backend):
    logits = torch.eye(10)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 9, 9, -100, -100])
    for ratio, alpha in ((1.0, 0.25), (0.5, 0.625), (2.0, 0.0)):
        _, stats = self_distillation_loss(
            logits, labels, sdfast.AdaptiveAlpha(ratio), backend=backend, return_stats=True
        )
        assert stats.accuracy.item() == 0.75
        assert stats.alpha.item() == pytest.approx(alpha)
        for a in (alpha, torch.tensor(alpha)):
            torch.testing.assert_close(
                self_distillation_loss(logits, labels, sdfast.AdaptiveAlpha(ratio), backend=backend),
                self_distillation_loss(logits, labels, a, backend=backend),
            )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_column_regression_learns_signs(backend):
    """±1 labels of the binary papers: (N,) or (N, 1), accuracy by sign, targets clipped to [-1, 1]."""
    logits = torch.tensor([[3.0], [-0.2], [0.1], [-5.0]])
    labels = torch.tensor([1.0, 1.0, 1.0, -1.0])
    for given in (labels, labels[:, None]):
        loss, stats = self_distillation_loss(
            logits, given, 0.5, loss="mse", label_fn=sdfast.ClipLabel(0.25), return_stats=True, backend=backend
        )
        target = 0.5 * labels + 0.5 * (8 * logits[:, 0]).clamp(-1, 1)
        torch.testing.assert_close(loss, F.mse_loss(logits[:, 0], target))
        assert stats.accuracy.item() == 0.75


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(backend):
    logits = torch.randn(2, 3, 4, 6)
    labels = torch.randint(0, 6, (2, 3, 4))
    weight, alpha = torch.rand(2, 2, 3, 4).unbind()
    loss = self_distillation_loss(logits, labels, alpha, row_weight=weight, reduction="none", backend=backend)
    flat = self_distillation_loss(
        logits.reshape(24, 6), labels.reshape(-1), alpha.reshape(-1), row_weight=weight.reshape(-1), reduction="none",
        backend=backend,
    )  # fmt: skip
    assert torch.equal(loss, flat.reshape(2, 3, 4))
    one = self_distillation_loss(logits[0, 0, 0], labels[0, 0, 0], 0.5, reduction="none", backend=backend)
    assert one.shape == ()
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(
            self_distillation_loss(logits, labels.to(dtype), 0.5, backend=backend),
            self_distillation_loss(logits, labels, 0.5, backend=backend),
        )


@pytest.mark.parametrize("classes", [10, 130, 40000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_batch_and_repeats_bit_for_bit(backend, classes):
    """Also not on the number of threads, and not on whether a row or its columns are shared among them."""
    rows = 70 if classes < 1000 else 5
    logits = 4 * torch.randn(rows, classes)
    labels = torch.randint(0, classes, (rows,))
    threads = torch.get_num_threads()
    for options in ({}, {"label_fn": "softmax", "temperature": 0.5}, {"loss": "brier", "label_smoothing": 0.1}):

        def run(x, y, options=options):
            x = x.clone().requires_grad_()
            loss = self_distillation_loss(x, y, 0.4, reduction="none", backend=backend, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            return loss.detach(), gradient

        loss, gradient = run(logits, labels)
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                again = run(logits, labels)
                assert torch.equal(again[0], loss)
                assert torch.equal(again[1], gradient)
                for i in (0, rows - 1):
                    alone = run(logits[i : i + 1], labels[i : i + 1])
                    assert torch.equal(alone[0], loss[i : i + 1])
                    assert torch.equal(alone[1], gradient[i : i + 1])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend):
    row, labels = torch.randn(1, 12), torch.randint(0, 12, (6,))
    expanded = row.expand(6, 12).requires_grad_()
    loss = self_distillation_loss(expanded, labels, 0.5, source=row.expand(6, 12), backend=backend)
    want = self_distillation_loss(row.repeat(6, 1), labels, 0.5, backend=backend)
    assert torch.equal(loss.detach(), want)
    probabilities = torch.rand(1, 12).softmax(-1).expand(6, 12)
    assert torch.equal(
        self_distillation_loss(expanded, probabilities, 0.5, backend=backend),
        self_distillation_loss(expanded, probabilities.contiguous(), 0.5, backend=backend),
    )
