"""Losses on a prediction bank: every backend against the float64 reference, loss, gradient, statistics and the bank."""

import copy
import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, LAYOUTS, assert_as_good_as_torch, awkward, backends, interpreted, poison, random_numbers

import sdfast
from sdfast import PredictionBank, elr_loss, self_distillation_loss

BACKENDS = backends()
ALL = ["reference", *BACKENDS]


def fill(bank, generator=None, least=0):
    """Random rows, some of them unseen unless `least` is 1."""
    rows = (2 * torch.randn(bank.num_samples, bank.num_classes, generator=generator, dtype=torch.float64)).softmax(-1)
    bank.seen.copy_(torch.randint(least, 4, (bank.num_samples,), generator=generator))
    if not bank.bias_correction:
        rows *= 1 - bank.momentum ** bank.seen.double()[:, None]
    put(bank, rows * (bank.seen > 0)[:, None])
    return bank


def put(bank, rows):
    if bank.top_k is None:
        bank.predictions.copy_(rows)
    else:
        values, classes = sdfast.ops.prediction_bank.storage.sparse_rows(rows, bank.top_k)
        bank.predictions.copy_(values)
        bank.classes.copy_(classes)


@dataclasses.dataclass(repr=False)
class Case:
    """One call on a bank: float64 tensors, given to each backend in `dtype` and `layout`; with a strength ELR."""

    logits: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    bank: PredictionBank
    alpha: object
    options: dict
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"

    def __repr__(self):
        shown = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        alpha = tuple(self.alpha.shape) if isinstance(self.alpha, torch.Tensor) else self.alpha
        labels = f"{self.labels.dtype}{tuple(self.labels.shape)}"
        return f"{tuple(self.logits.shape)} {self.dtype} {self.layout}, labels {labels}, {alpha}, {shown}, {self.bank}"

    def _repr_pretty_(self, printer, cycle):  # what hypothesis asks for
        printer.text(repr(self))

    def run(self, backend, dtype, exact_bank=False):
        """(loss, gradient, stats, probabilities, seen) of what `self.dtype` can hold, computed in `dtype`."""
        options = dict(self.options)
        bank = copy.deepcopy(self.bank)
        if exact_bank:
            bank = PredictionBank(
                bank.num_samples, bank.num_classes, bank.momentum, torch.float64, bank.order, warm_up=bank.warm_up,
                bias_correction=bank.bias_correction, top_k=bank.top_k,
            )  # fmt: skip
            bank.load_state_dict(self.bank.state_dict())
        logits = awkward(self.logits.to(self.dtype).to(dtype), self.layout).detach().requires_grad_()
        poison(logits)
        rows = bank.rows(self.indices)
        stats = ()
        if "strength" in options:
            loss = elr_loss(logits, self.labels, rows, backend=backend, **options)
        else:
            loss, stats = self_distillation_loss(
                logits, self.labels, self.alpha, source=rows, return_stats=True, backend=backend, **options
            )
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
        (gradient,) = torch.autograd.grad(loss, logits, upstream)
        return loss, gradient, stats, bank.probabilities(), bank.seen

    def condition(self):
        """How far log(1 − ⟨t, p⟩) magnifies the rounding of t and p, per kept row."""
        strength = self.options.get("strength", 0)
        kept = self.labels != -100 if self.labels.dim() == 1 else slice(None)
        if not strength or self.labels[kept].numel() == 0:
            return torch.ones(max(1, len(self.labels)))  # the target's own rounding moves each row's divergence
        terms = []
        for unit in (0.0, 1.0):  # in training, for what write_then_read reads has this prediction in it
            rows = copy.deepcopy(self.bank).rows(self.indices)
            options = {"strength": unit, "clamp": self.options.get("clamp", 1e-4), "reduction": "none"}
            logits = self.logits.detach().requires_grad_()
            terms.append(elr_loss(logits, self.labels, rows, backend="reference", **options).detach())
        room = (terms[1] - terms[0])[kept].exp()
        if hypothesis.currently_in_test_context():
            hypothesis.assume(room.min().item() >= 1e-5)  # without a clamp there is no bound
        return 1 + strength / room

    def check(self, backend):
        got, torch_result = self.run(backend, self.dtype), self.run("reference", self.dtype)
        exact = self.run("reference", torch.float64, exact_bank=True)
        conditions = self.condition()
        condition = conditions.max().item()
        of_loss = conditions.sum().item() if self.options.get("reduction") == "sum" else condition
        assert_as_good_as_torch("loss", got[0], torch_result[0], exact[0], of_loss)
        unit = 1.0 if self.options.get("reduction") in ("sum", "none") else 1.0 / max(1, len(self.logits))
        unit *= condition
        if interpreted(backend) and self.dtype == torch.bfloat16 and len(self.logits):
            unit = max(unit, 2**14 * exact[1].abs().max().item())  # one more unit in the last place
        assert_as_good_as_torch("gradient", got[1], torch_result[1], exact[1], unit)
        for name, g, t, e in zip(sdfast.LossStats._fields, got[2], torch_result[2], exact[2], strict=False):
            assert_as_good_as_torch(name, g, t, e)
        if self.dtype != torch.float64:  # a float64 bank then holds float32 arithmetic
            got, torch_result = ((*r[:3], r[3].float(), r[4]) for r in (got, torch_result))
        truncates = interpreted(backend) and self.bank.predictions.dtype == torch.bfloat16
        assert_as_good_as_torch("bank", got[3], torch_result[3], exact[3], 2**14 if truncates else 1)
        assert torch.equal(got[4], exact[4])


@st.composite
def cases(draw):
    rows, classes = draw(st.sampled_from((0, 1, 2, 5, 40))), draw(st.sampled_from((1, 2, 3, 10, 33, 129, 1000)))
    generator = random_numbers(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    bank = PredictionBank(
        draw(st.sampled_from((7, 50))), classes, draw(st.sampled_from((0.0, 0.7, 0.999))),
        draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float64))),
        draw(st.sampled_from(("read_then_write", "write_then_read"))), bias_correction=draw(st.booleans()),
        warm_up=draw(st.sampled_from((0, 0, 2))),
        top_k=draw(st.sampled_from((None, 1, 4))) if classes > 4 else None,
    )  # fmt: skip
    fill(bank, generator)
    indices = torch.randint(bank.num_samples, (rows,), generator=generator)
    soft = draw(st.booleans())
    if soft:
        labels = (2 * normal(rows, classes)).softmax(-1)
    else:
        labels = torch.randint(0, classes, (rows,), generator=generator)
        labels[uniform(rows) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = -100
        indices[labels == -100] = -7  # an ignored row's index is not looked at
    options = {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "row_weight": uniform(rows) if draw(st.booleans()) else None,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
    }
    alpha = None
    if draw(st.booleans()):
        options |= {"strength": draw(st.sampled_from((0.0, 3.0))), "clamp": draw(st.sampled_from((0.0, 1e-4, 0.01)))}
        loss = "cross_entropy"
    else:
        loss = draw(st.sampled_from(("cross_entropy", "kl", "brier", "mse")))
        label_fn = draw(st.sampled_from(("softmax", "hardmax")))
        options |= {"loss": loss, "label_fn": label_fn}
        options["temperature"] = draw(st.sampled_from((1.0, 0.5, 4.0))) if label_fn == "softmax" else 1.0
        if loss == "mse" and soft:
            options["label_smoothing"] = 0.0
        if loss != "mse":
            options["target_temperature"] = draw(st.sampled_from((1.0, 1.0, 0.5)))
            if label_fn == "softmax" and (soft or options["label_smoothing"]):
                options["mixing"] = draw(st.sampled_from(("arithmetic", "geometric")))
            if not soft and options["row_weight"] is None and draw(st.booleans()):
                options["row_weight"] = sdfast.GeneralizedCrossEntropy(draw(st.sampled_from((0.3, 0.7, 1.0))))
        alpha = draw(st.sampled_from((0.0, 0.3, 1.0, uniform(rows), uniform(1)[0], sdfast.AdaptiveAlpha(0.9))))
    if loss in ("cross_entropy", "kl") and draw(st.booleans()):
        options["class_weight"] = uniform(classes) + 0.1
    return Case(
        draw(st.sampled_from((1.0, 8.0))) * normal(rows, classes), labels, indices, bank, alpha, options,
        draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS)),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_call_matches_the_reference(backend):
    @hypothesis.settings(max_examples=60 if backend == "triton" else 500, deadline=None, derandomize=False)
    @hypothesis.given(cases())
    def check(case):
        hypothesis.assume(backend != "cuda" or case.bank.top_k is None)
        case.check(backend)

    check()


# 10: less than a vector and a half; 1000: many; 50257: several chunks of columns, ragged.
@pytest.mark.parametrize("classes", [10, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_widths(backend, dtype, classes):
    if interpreted(backend) and classes == 50257 and dtype != torch.float32:
        pytest.skip("one dtype at this width is enough of the interpreter")
    for options in ({"label_fn": "softmax", "temperature": 0.5}, {"label_fn": "softmax"}, {"strength": 7.0}):
        bank = fill(PredictionBank(9, classes, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32))
        logits, labels = 5 * torch.randn(4, classes, dtype=torch.float64), torch.randint(classes, (4,))
        Case(logits, labels, torch.tensor([3, 8, 0, 8]), bank, 0.4, options, dtype).check(backend)


def step(bank, logits, labels, indices, backend=None, alpha=0.5, **options):
    """(loss, gradient) of one training step."""
    leaf = logits.detach().clone().requires_grad_()
    loss = self_distillation_loss(leaf, labels, alpha, source=bank.rows(indices), backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("backend", ALL)
def test_the_mean_is_bias_corrected(backend, momentum):
    """Σ_k β^(n−k) p_k / Σ_k β^(n−k), and without correction (1 − β) Σ_k β^(n−k) p_k."""
    history = torch.randn(5, 4, 6, dtype=torch.float64)
    for corrected in (True, False):
        bank = PredictionBank(4, 6, momentum, torch.float64, bias_correction=corrected)
        for logits in history:
            step(bank, logits, torch.zeros(4, dtype=torch.int64), torch.arange(4), backend)
        shares = momentum ** torch.arange(4, -1, -1, dtype=torch.float64)
        shares = shares / shares.sum() if corrected else (1 - momentum) * shares
        torch.testing.assert_close(bank.probabilities(), (shares[:, None, None] * history.softmax(-1)).sum(0))
        assert bank.seen.tolist() == [5] * 4


@pytest.mark.parametrize("backend", ALL)
def test_the_order_of_reading_and_writing(backend):
    first, second = torch.randn(2, 3, 5, dtype=torch.float64).unbind()
    labels, indices = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    for order in ("read_then_write", "write_then_read"):
        bank = PredictionBank(3, 5, 0.5, torch.float64, order)
        unseen, _ = step(bank, first, labels, indices, backend, label_fn="softmax")
        loss, _ = step(bank, second, labels, indices, backend, label_fn="softmax")
        p, q = first.softmax(-1), second.softmax(-1)
        mean = p + (q - p) * 0.5 / 0.75
        target = p if order == "read_then_write" else mean
        y = F.one_hot(labels, 5).double()
        torch.testing.assert_close(loss, F.cross_entropy(second, 0.5 * y + 0.5 * target))
        # The first time there is nothing to read but, in the second order, the prediction itself.
        known = F.cross_entropy(first, y if order == "read_then_write" else 0.5 * y + 0.5 * p)
        torch.testing.assert_close(unseen, known)
        torch.testing.assert_close(bank.probabilities(indices), mean)


@pytest.mark.parametrize("backend", ALL)
def test_temperature_acts_on_the_logarithm(backend):
    """h ∝ p^(1/T), never a softmax of probabilities; at T = 1 the row itself."""
    p = torch.tensor([[0.7, 0.2, 0.1, 0.0], [1e-30, 0.25, 0.25, 0.5]], dtype=torch.float64)
    bank = PredictionBank(2, 4, 0.5, torch.float64)
    bank.seen.fill_(1)
    logits = torch.randn(2, 4, dtype=torch.float64)
    for temperature in (1.0, 0.5, 2.0, 7.5):
        bank.predictions.copy_(p)
        bank.eval()
        loss, _ = step(bank, logits, torch.tensor([0, 3]), torch.arange(2), backend, 0.0, label_fn="softmax",
                       temperature=temperature)  # fmt: skip
        h = p ** (1 / temperature)
        torch.testing.assert_close(loss, F.cross_entropy(logits, h / h.sum(-1, keepdim=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ALL)
def test_denormal_probabilities_have_logarithms(backend, dtype):
    bank = PredictionBank(1, 9, 0.5, dtype).eval()
    bank.predictions.fill_(1e-42 if dtype == torch.float32 else 1e-310)
    bank.predictions[0, 0] = 1
    bank.seen.fill_(1)
    held = bank.predictions.double().clone()
    loss, _ = step(bank, torch.zeros(1, 9, dtype=dtype), torch.tensor([0]), torch.tensor([0]), backend, 0.0,
                   label_fn="softmax", temperature=100.0, loss="kl")  # fmt: skip
    h = held**0.01
    h = h / h.sum()
    assert loss.item() == pytest.approx((h * (h.log() + torch.tensor(9.0).log())).sum().item(), rel=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_of_duplicates_all_read_and_the_last_writes(backend):
    logits = torch.randn(6, 40, dtype=torch.float64)
    indices, labels = torch.tensor([4, 1, 4, 3, 1, 4]), torch.randint(40, (6,))
    for order in ("read_then_write", "write_then_read"):
        bank = fill(PredictionBank(5, 40, 0.7, torch.float64, order), least=1)
        before = copy.deepcopy(bank)
        loss, gradient = step(bank, logits, labels, indices, backend, label_fn="softmax", reduction="none")
        for i in range(6):  # each as if it were alone with the bank before
            alone = copy.deepcopy(before)
            rows = slice(i, i + 1)
            want = step(alone, logits[rows], labels[rows], indices[rows], backend, label_fn="softmax", reduction="none")
            assert torch.equal(loss[rows], want[0])
            assert torch.equal(gradient[rows], want[1])
            if i >= 3:
                assert torch.equal(bank.predictions[indices[i]], alone.predictions[indices[i]])
        assert (bank.seen - before.seen).tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_are_the_same_bits_on_any_number_of_threads(backend):
    """Large enough that rows go to several threads, most indices several times."""
    rows = 40 if interpreted(backend) else 600
    logits, labels, indices = torch.randn(rows, 300), torch.randint(300, (rows,)), torch.randint(rows // 7, (rows,))
    first = fill(PredictionBank(90, 300, order="write_then_read"))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1,) if interpreted(backend) else (1, 2, 5):
            torch.set_num_threads(count)
            for _ in range(3):
                bank = copy.deepcopy(first)
                results.append((*step(bank, logits, labels, indices, backend), bank.predictions))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ALL)
def test_rows_that_are_not_finite_leave_the_bank_alone(backend, bad):
    logits, labels, indices = torch.randn(4, 20), torch.randint(20, (4,)), torch.tensor([3, 0, 2, 1])
    logits[1] = bad
    logits[2, 5] = bad
    for order in ("read_then_write", "write_then_read"):
        bank = fill(PredictionBank(4, 20, order=order))
        before = copy.deepcopy(bank)
        step(bank, logits, labels, indices, backend)
        untouched = torch.tensor(
            [0] if bad == -torch.inf else [0, 2]
        )  # -inf masks a class: the others are a prediction
        assert torch.equal(bank.predictions[untouched], before.predictions[untouched])
        assert (bank.seen - before.seen).tolist() == [0, 1, int(bad == -torch.inf), 1]
        assert bank.predictions.isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_writing_needs_gradients_and_training_mode_and_a_fresh_handle(backend):
    logits, labels, indices = torch.randn(3, 6), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    for order in ("read_then_write", "write_then_read"):
        bank = fill(PredictionBank(3, 6, order=order, warm_up=1))
        before = copy.deepcopy(bank)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                quiet = self_distillation_loss(logits, labels, 0.5, source=bank.rows(indices), backend=backend)
                elr_loss(logits, labels, bank.rows(indices), backend=backend)
        bank.eval()
        step(bank, logits, labels, indices, backend)
        bank.train()
        assert torch.equal(bank.predictions, before.predictions)
        assert torch.equal(bank.seen, before.seen)
        rows = bank.rows(indices)
        loud = self_distillation_loss(logits, labels, 0.5, source=rows, backend=backend)
        assert torch.equal(quiet, loud)  # the loss is the same with writing or without
        once = copy.deepcopy(bank)
        self_distillation_loss(logits, labels, 0.5, source=rows, backend=backend)
        assert torch.equal(bank.predictions, once.predictions)
        assert (bank.seen - before.seen).tolist() == [1, 1, 1]


@pytest.mark.parametrize("backend", ALL)
def test_warm_up_counts_each_samples_own_predictions(backend):
    """The first E predictions of a sample only go in: its loss is plain, its gradient bit for bit."""
    logits, labels, indices = torch.randn(4, 6), torch.randint(6, (4,)), torch.arange(4)
    for order, quiet in (("read_then_write", 2), ("write_then_read", 2)):
        bank = PredictionBank(4, 6, 0.5, order=order, warm_up=2)
        plain = [
            self_distillation_loss(logits, labels, 1.0, reduction="none", backend=backend),
            F.cross_entropy(logits, labels, reduction="none"),
        ]
        for visit in range(4):
            loss, _ = step(bank, logits, labels, indices, backend, 0.3, reduction="none")
            held = torch.isclose(loss, plain[0], rtol=1e-6).all()
            assert held == (visit < quiet)
        bank = PredictionBank(4, 6, 0.5, order=order, warm_up=2)
        for visit in range(4):
            elr = elr_loss(logits, labels, bank.rows(indices), reduction="none", backend=backend)
            assert torch.isclose(elr, plain[1]).all() == (visit < quiet)


@pytest.mark.parametrize("backend", ALL)
def test_previous_epoch_mode(backend):
    """Momentum 0 keeps the very last prediction."""
    bank, labels = PredictionBank(3, 7, momentum=0, dtype=torch.float64), torch.tensor([1, 2, 3])
    for _ in range(3):
        logits = torch.randn(3, 7, dtype=torch.float64)
        step(bank, logits, labels, torch.arange(3), backend)
        torch.testing.assert_close(bank.probabilities(), logits.softmax(-1), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("backend", ALL)
def test_elr_is_the_authors_code(backend):
    """Their forward, written out; the bank written before it is read, without bias correction, p clamped."""
    strength, beta, classes = 3.0, 0.7, 12
    bank = PredictionBank(8, classes, beta, torch.float64, "write_then_read", bias_correction=False)
    target = torch.zeros(8, classes, dtype=torch.float64)
    for _ in range(4):
        indices, labels = torch.randperm(8)[:5], torch.randint(classes, (5,))
        logits = 6 * torch.randn(5, classes, dtype=torch.float64)
        theirs, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        p = theirs.softmax(1).clamp(1e-4, 1 - 1e-4)
        held = p.detach()
        target[indices] = beta * target[indices] + (1 - beta) * (held / held.sum(1, keepdim=True))
        want = F.cross_entropy(theirs, labels) + strength * (1 - (target[indices] * p).sum(1)).log().mean()
        got = elr_loss(ours, labels, bank.rows(indices), strength=strength, backend=backend)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, ours), torch.autograd.grad(want, theirs))
        torch.testing.assert_close(bank.probabilities(), target)


@pytest.mark.parametrize("backend", ALL)
def test_elr_gradient_is_the_formula(backend):
    """p − y + λ p ⊙ (⟨t, p⟩ − t) / (1 − ⟨t, p⟩), of methods without a clamp."""
    bank = fill(PredictionBank(6, 9, dtype=torch.float64), least=1)
    logits = torch.randn(6, 9, dtype=torch.float64).requires_grad_()
    labels, t, p = torch.randint(9, (6,)), bank.probabilities(), logits.detach().softmax(-1)
    loss = elr_loss(logits, labels, bank.rows(torch.arange(6)), clamp=0, reduction="sum", backend=backend)
    inner = (t * p).sum(-1, keepdim=True)
    want = p - F.one_hot(labels, 9) + 7.0 * p * (inner - t) / (1 - inner)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, reduction):
    bank = fill(PredictionBank(9, 5, dtype=torch.float64)).eval()
    logits, labels = torch.randn(3, 5, dtype=torch.float64).requires_grad_(), torch.tensor([3, 1, -100])
    indices = torch.tensor([2, 2, 5])
    fast = interpreted(backend)  # one random direction, not each entry
    for clamp in (0, 1e-4):
        assert torch.autograd.gradcheck(
            lambda x, c=clamp: elr_loss(x, labels, bank.rows(indices), clamp=c, reduction=reduction, backend=backend),
            logits,
            fast_mode=fast,
        )
    for options in ({}, {"label_fn": "softmax", "temperature": 0.5, "loss": "brier"}, {"loss": "mse"}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: self_distillation_loss(
                x, labels, 0.3, source=bank.rows(indices), reduction=reduction, backend=backend, **o
            ),
            logits,
            fast_mode=fast,
        )


@pytest.mark.parametrize("backend", ALL)
def test_nothing_kept_gives_zero_and_writes_nothing(backend):
    for rows in (0, 5):
        bank = fill(PredictionBank(5, 7))
        before = bank.predictions.clone()
        logits = torch.randn(rows, 7).requires_grad_()
        labels = torch.full((rows,), -100)
        for loss in (
            self_distillation_loss(logits, labels, 0.5, source=bank.rows(torch.arange(rows)), backend=backend),
            elr_loss(logits, labels, bank.rows(torch.arange(rows)), backend=backend),
        ):
            assert loss == 0
            assert (torch.autograd.grad(loss, logits)[0] == 0).all()
        assert torch.equal(bank.predictions, before)


@pytest.mark.parametrize("backend", ALL)
def test_leading_dimensions(backend):
    logits, labels, indices = torch.randn(2, 3, 6), torch.randint(6, (2, 3)), torch.arange(6).view(2, 3).to(torch.int32)
    flat, shaped = fill(PredictionBank(9, 6)), None
    shaped = copy.deepcopy(flat)
    loss, _ = step(shaped, logits, labels, indices, backend, reduction="none")
    want, _ = step(flat, logits.view(6, 6), labels.view(6), indices.view(6), backend, reduction="none")
    assert torch.equal(loss, want.view(2, 3))
    assert torch.equal(flat.predictions, shaped.predictions)
