"""What a GPU adds to the promises of every operation: no host reads, CUDA graphs, streams, devices, launches.

The steps themselves run on the CPU too, so that a mistake in them shows without a GPU.
"""

import copy

import pytest
import torch
from helpers import INTERPRETED, of_triton

import sdfast
from sdfast import PredictionBank, ntk
from sdfast.ops.gram import add_gram, add_hadamard_gram
from sdfast.ops.sample_gradients import channel_sample_gradients, convolution_sample_gradients

pytestmark = pytest.mark.skipif(INTERPRETED, reason="a GPU's promises, which the interpreter does not make")

SMALL, LARGE = (128, 10), (3000, 100)  # one block's work, and more than that


class Step:
    """One call of an operation on tensors of its own, and what its result depends on."""

    def __init__(self, call, *inputs):
        self.call, self.inputs = call, inputs

    def __call__(self):
        """Everything the call gives."""
        return self.call(*self.inputs)


def loss_step(loss, shape, dtype=torch.float32):
    """Loss and gradient: ``loss(logits, labels, other)``, `other` being shaped as the logits."""
    logits = torch.randn(shape).to(dtype).requires_grad_()
    labels = torch.randint(0, shape[1], shape[:1])
    labels[::5] = -100

    def call(logits, labels, other):
        value = loss(logits, labels, other)
        return value.detach(), *torch.autograd.grad(value.sum(), logits)

    return Step(call, logits, labels, torch.randn(shape).to(dtype))


def bank_step(loss, shape):
    """The same on the rows of a bank that is not written to."""
    bank = PredictionBank(shape[0], shape[1]).eval()
    bank.predictions.copy_(torch.randn(shape).softmax(-1))
    bank.seen.fill_(3)
    indices = torch.randperm(shape[0])
    return loss_step(lambda x, y, _: loss(x, y, bank.rows(indices)), shape)


def linear_step(loss, shape):
    """Loss and gradients of hidden states and weight, in several chunks of rows."""
    rows, classes = shape
    hidden, weight = torch.randn(rows, 16).requires_grad_(), torch.randn(classes, 16).requires_grad_()

    def call(hidden, weight, labels):
        value = loss(hidden, weight, labels, rows // 3)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    return Step(call, hidden, weight, torch.randint(0, classes, (rows,)))


def gram_step(backend):
    """Both products, added to fresh totals."""

    def call(rows, left, right):
        totals = torch.zeros(90, 90, dtype=torch.float64), torch.zeros(90, 90)
        add_gram(totals[0], rows, backend=backend)
        add_hadamard_gram(totals[1], (left, right), splits=[(7, 3), (33, 9)], precision="bf16x3", backend=backend)
        return totals

    return Step(call, torch.randn(90, 300), torch.randn(90, 40), torch.randn(90, 12))


def gradients_step(backend):
    """A convolution's gradients per sample and a batch norm's."""

    def call(x, g):
        rows = convolution_sample_gradients(x, g, (3, 3), padding=1, backend=backend)
        mean, rstd = x.new_zeros(6), x.new_ones(6)
        return rows, *channel_sample_gradients(x[:, None], x[:, None], mean, rstd, backend=backend)

    return Step(call, torch.randn(4, 6, 9, 8), torch.randn(4, 5, 9, 8))


def self_distillation(backend, **options):
    """The loss of a step, by name of its options."""
    alpha = options.pop("alpha", 0.6)
    return lambda x, y, _: sdfast.self_distillation_loss(x, y, alpha, backend=backend, **options)


STEPS = {
    "hardmax": lambda b, shape: loss_step(self_distillation(b), shape),
    "bfloat16": lambda b, shape: loss_step(self_distillation(b), shape, torch.bfloat16),
    "adaptive": lambda b, shape: loss_step(self_distillation(b, alpha=sdfast.AdaptiveAlpha(0.7)), shape),
    "a loss a row": lambda b, shape: loss_step(self_distillation(b, reduction="none"), shape),
    "source": lambda b, shape: loss_step(
        lambda x, y, source: sdfast.self_distillation_loss(
            x, y, 0.6, source=source, label_fn="softmax", temperature=0.5, loss="brier", backend=b
        ),
        shape,
    ),
    "weighted": lambda b, shape: loss_step(
        self_distillation(b, row_weight=sdfast.GeneralizedCrossEntropy(0.7), label_smoothing=0.1), shape
    ),
    "small loss": lambda b, shape: loss_step(self_distillation(b, row_weight=sdfast.SmallLoss(0.5)), shape),
    "bank": lambda b, shape: bank_step(
        lambda x, y, rows: sdfast.self_distillation_loss(x, y, 0.6, source=rows, label_fn="softmax", backend=b), shape
    ),
    "elr": lambda b, shape: bank_step(lambda x, y, rows: sdfast.elr_loss(x, y, rows, backend=b), shape),
}
OF_TRITON = {
    "distillation": lambda b, shape: loss_step(lambda x, y, t: sdfast.distillation_loss(x, t, y, backend=b), shape),
    "js": lambda b, shape: loss_step(lambda x, y, t: sdfast.distillation_loss(x, t, divergence="js", backend=b), shape),
    "linear": lambda b, shape: linear_step(
        lambda h, w, y, chunk: sdfast.linear_self_distillation_loss(h, w, y, 0.6, chunk_rows=chunk, backend=b), shape
    ),
    "linear distillation": lambda b, shape: linear_step(
        lambda h, w, y, chunk: sdfast.linear_distillation_loss(
            h, w, h.detach(), w.detach(), y, chunk_rows=chunk, backend=b
        ),
        shape,
    ),
    "gram": lambda b, _: gram_step(b),
    "sample gradients": lambda b, _: gradients_step(b),
}
CASES = [(backend, name) for backend in ("cuda", "triton") for name in STEPS] + [("triton", n) for n in OF_TRITON]
ON_GPU = pytest.mark.parametrize(("backend", "name"), CASES)
SHAPES = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])


def make(name, backend, shape=LARGE):
    return (STEPS | OF_TRITON)[name](backend, shape)


def same(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*STEPS, *OF_TRITON])
def test_the_steps_themselves(name):
    """On the CPU, where they are checked to repeat and to be right."""
    step = make(name, "cpu")
    same(step(), step())
    exact = make(name, "reference")
    exact.inputs = step.inputs
    if name not in ("bank", "elr"):  # which hold a bank of their own
        for got, wanted in zip(step(), exact(), strict=True):
            torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-3)


@SHAPES
@ON_GPU
def test_no_host_read(backend, name, shape):
    step = make(name, backend, shape)
    step()  # compiles, and picks its settings
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@SHAPES
@ON_GPU
def test_capture_and_replay(backend, name, shape):
    """A captured step follows its inputs: other numbers in the same memory."""
    step = make(name, backend, shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in step.inputs:
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape))
        wanted = step()
        graph.replay()
        same(captured, wanted)


@pytest.mark.parametrize("order", ["read_then_write", "write_then_read"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_step_writes_its_bank_each_time(backend, order):
    rows, classes = LARGE
    eager = PredictionBank(rows, classes, 0.8, order=order)
    logits, labels = torch.randn(LARGE).requires_grad_(), torch.randint(0, classes, (rows,))
    indices = torch.randint(0, rows, (rows,))  # some several times

    def step(bank):
        loss = sdfast.self_distillation_loss(logits, labels, 0.5, source=bank.rows(indices), backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    step(copy.deepcopy(eager))
    captured = copy.deepcopy(eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(captured)
    assert captured.seen.sum() == 0
    for _ in range(3):
        graph.replay()
        same(got, step(eager))
        assert torch.equal(captured.predictions, eager.predictions)
        assert torch.equal(captured.seen, eager.seen)


@ON_GPU
def test_the_current_stream(backend, name):
    """A step on a stream whose inputs arrive late, and on that stream alone."""
    step = make(name, backend)
    wanted = step()
    values = [tensor.detach().clone() for tensor in step.inputs]
    with torch.no_grad():
        for tensor in step.inputs:
            tensor.zero_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for tensor, value in zip(step.inputs, values, strict=True):
                tensor.copy_(value)
        got = step()
    side.synchronize()
    same(got, wanted)


@ON_GPU
def test_a_device_that_is_not_current(backend, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    torch.manual_seed(1)
    with torch.device("cuda:1"):
        step = make(name, backend)
        got = step()
    assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in got} == {1}
    with torch.cuda.device(1), torch.device("cuda:1"):
        same(step(), got)


def kernels_of(run):
    """Names of the kernels that ran, as the profiler has them."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    events = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]


# (rows, classes), alpha, launches of the forward; the backward has one at most, beside torch's own fill of a 1.
LAUNCHES = [
    ((128, 10), 0.5, 1), ((128, 100), 0.5, 1), ((128, 10), sdfast.AdaptiveAlpha(0.7), 2),
    ((4096, 1000), 0.5, 2), ((4096, 1000), sdfast.AdaptiveAlpha(0.7), 2),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "alpha", "most"), LAUNCHES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_launches(backend, shape, alpha, most):
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would be a kernel for each tensor
    logits, labels = torch.randn(shape).requires_grad_(), torch.randint(0, shape[1], shape[:1])
    one = torch.ones(())

    def forward():
        return sdfast.self_distillation_loss(logits, labels, alpha, backend=backend)

    def both():
        torch.autograd.grad(forward(), logits, one)

    first, all_of_them = kernels_of(forward), kernels_of(both)
    assert 1 <= len(first) <= most, first
    assert len(all_of_them) - len(first) <= 1, all_of_them


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_bank_takes_one_launch_more_at_most(backend):
    torch.utils.deterministic.fill_uninitialized_memory = False
    bank = PredictionBank(128, 10)
    logits, labels, indices = torch.randn(128, 10).requires_grad_(), torch.randint(0, 10, (128,)), torch.randperm(128)

    def forward():
        return sdfast.self_distillation_loss(logits, labels, 0.5, source=bank.rows(indices), backend=backend)

    assert 1 <= len(kernels_of(forward)) <= 2, kernels_of(forward)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_bad_label_poisons_its_row_alone(backend):
    """Nobody looks at a label on the host: its row is NaN, its neighbours are as they were, and so is the memory."""
    for rows, classes in (SMALL, LARGE):
        logits, labels = torch.randn(rows, classes).requires_grad_(), torch.randint(0, classes, (rows,))
        for bad in (-1, classes, 2**40):
            wrong = labels.clone()
            wrong[rows // 2] = bad
            for reduction in ("none", "sum"):
                pair = [
                    sdfast.self_distillation_loss(logits, y, 0.5, reduction=reduction, backend=backend)
                    for y in (labels, wrong)
                ]
                right, got = (torch.autograd.grad(value.sum(), logits)[0] for value in pair)
                others = torch.arange(rows) != rows // 2
                assert got[rows // 2].isnan().all()
                assert torch.equal(got[others], right[others])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_entries_than_32_bits_count(backend):
    rows, classes = 66_000, 32_768
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("wants 16 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.empty(rows, classes, dtype=torch.bfloat16).normal_().requires_grad_()
    labels = torch.randint(0, classes, (rows,))
    loss = sdfast.self_distillation_loss(logits, labels, 0.5, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    for part in (slice(0, 40), slice(rows - 40, rows)):
        x = logits[part].detach().requires_grad_()
        alone = sdfast.self_distillation_loss(x, labels[part], 0.5, reduction="sum", backend=backend)
        assert torch.equal(gradient[part], torch.autograd.grad(alone, x)[0])


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bf16x3", "bf16", "float64"])
def test_a_network_on_the_gpu_has_the_kernel_it_has_on_the_cpu(precision):
    model = sdfast.models.mlp((12, 8, 3))
    x = torch.randn(9, 12)
    wanted = ntk.gram(model.double(), x.double(), outputs="trace", precision="float64")
    dtype = torch.float64 if precision == "float64" else torch.float32
    got = ntk.gram(model.to("cuda", dtype), x.to("cuda", dtype), outputs="trace", precision=precision)
    assert got.device.type == "cuda"
    allowed = {"float32": 1e-5, "bf16x3": 1e-5, "bf16": 2e-2, "float64": 1e-12}[precision]
    assert (got.cpu().double() - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_an_eigenspace_on_the_gpu(library):
    factor = torch.randn(300, 40, dtype=torch.float64)
    gram = factor @ factor.T
    labels = torch.randn(300, dtype=torch.float64)
    wanted = ntk.eigenspace(gram, 5)
    if library == "torch":
        there, back = torch.Tensor.cuda, torch.Tensor.cpu
    else:
        cupy = pytest.importorskip("cupy")
        there, back = cupy.asarray, lambda array: torch.from_numpy(array.get())
    space = ntk.eigenspace(there(gram), 5)
    assert type(space.values) is type(there(gram))
    torch.testing.assert_close(back(space.values), wanted.values, rtol=1e-8, atol=0)
    ratio = ntk.information_ratio(space, there(labels))
    assert float(ratio) == pytest.approx(float(ntk.information_ratio(wanted, labels)), rel=1e-6)


@of_triton
def test_triton_is_compiled_here(backend):
    """Not the interpreter: the step leaves a kernel of Triton's on the device."""
    names = kernels_of(make("hardmax", backend))
    assert names
    assert any("kernel" in name for name in names)
