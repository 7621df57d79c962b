"""A prediction bank in compiled and exported code, with activation checkpoints around it and in it."""

import copy

import pytest
import torch
from bank_cases import LOSSES, filled, inputs, same
from helpers import backends
from torch.utils.checkpoint import checkpoint

from sdfast import elr_loss


@pytest.mark.parametrize(
    ("mode", "order", "loss"),
    [("aot_eager", order, loss) for order in ("read_then_write", "write_then_read") for loss in LOSSES]
    + [("inductor", "write_then_read", "softmax"), ("inductor", "read_then_write", "elr")],
)
def test_compile_fullgraph_writes_as_eager_does(mode, order, loss):
    torch._dynamo.reset()
    eager, compiled = filled(order=order), None
    compiled = copy.deepcopy(eager)

    def run(bank, x, labels, indices, reduction="mean"):
        return 3 * LOSSES[loss](x * 2, labels, bank.rows(indices), reduction=reduction).sum()

    function = torch.compile(run, fullgraph=True, dynamic=True, backend=mode)
    for i in range(5):
        logits, labels, indices = inputs(rows=8 + i)
        for reduction in ("mean", "none"):
            results = []
            for bank, f in ((eager, run), (compiled, function)):
                value = f(bank, logits, labels, indices, reduction)
                results.append((value.detach(), torch.autograd.grad(value, logits)[0]))
            torch.testing.assert_close(*results)
            torch.testing.assert_close(compiled.predictions, eager.predictions)
            assert torch.equal(compiled.seen, eager.seen)
    with torch.no_grad():
        before = copy.deepcopy(compiled)
        torch.testing.assert_close(function(compiled, logits, labels, indices), run(eager, logits, labels, indices))
        assert same(before, compiled)


def test_a_handle_made_outside_of_compiled_code_writes_once():
    torch._dynamo.reset()
    bank = filled()
    before = bank.seen.clone()
    logits, labels, indices = inputs()
    compiled = torch.compile(lambda x, rows: elr_loss(x, labels, rows), fullgraph=True, backend="aot_eager")
    for visit in (1, 2):
        rows = bank.rows(indices)
        compiled(logits, rows).backward()
        assert rows.written
        compiled(logits, rows)
        assert (bank.seen - before).tolist() == [visit * int(i in indices) for i in range(20)]


@pytest.mark.parametrize(
    ("backend", "order", "reentrant"),
    [
        (backend, order, reentrant)
        for backend in backends()
        for order in ("read_then_write", "write_then_read")
        for reentrant in (False, True)
    ]
    + [("reference", "write_then_read", False)],  # seconds each
)
def test_a_checkpoint_around_compiled_code_writes_once(backend, order, reentrant):
    """What was compiled runs twice; value, gradient and bank are those of an eager call without a checkpoint."""
    torch._dynamo.reset()
    eager = filled(order=order)
    compiled = copy.deepcopy(eager)

    @torch.compile(backend="aot_eager")
    def run(x, labels, indices):
        return elr_loss(x * 2, labels, compiled.rows(indices), backend=backend)

    for _ in range(2):
        logits, labels, indices = inputs()
        before = compiled.seen.clone()
        value = checkpoint(run, logits, labels, indices, use_reentrant=reentrant)
        assert torch.equal(compiled.seen, before)
        want = elr_loss(logits * 2, labels, eager.rows(indices), backend=backend)
        torch.testing.assert_close(value, want)
        gradients = []
        for loss in (value, want):
            logits.grad = None
            loss.backward()
            gradients.append(logits.grad)
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(compiled.predictions, eager.predictions)
        assert torch.equal(compiled.seen, eager.seen)


@pytest.mark.parametrize("backend", backends())
def test_a_checkpoint_within_compiled_code_is_refused(backend):
    """A compiler would make the gradient again from rows that are written by then; without a write it may."""
    torch._dynamo.reset()
    logits, labels, indices = inputs()
    bank = filled()

    def inner(x):
        return elr_loss(x * 2, labels, bank.rows(indices), backend=backend)

    run = torch.compile(lambda x: checkpoint(inner, x, use_reentrant=False), backend="aot_eager")
    before = copy.deepcopy(bank)
    with pytest.raises(Exception, match=r"is not written in an activation checkpoint that torch\.compile compiles"):
        run(logits)
    assert same(bank, before)
    bank.eval()
    got, want = (torch.autograd.grad(f(logits), logits)[0] for f in (run, inner))
    torch.testing.assert_close(got, want)


def test_a_checkpoint_beside_the_loss_in_compiled_code():
    torch._dynamo.reset()
    eager = filled()
    compiled = copy.deepcopy(eager)

    def run(bank, x, labels, indices):
        return elr_loss(checkpoint(torch.tanh, x, use_reentrant=False), labels, bank.rows(indices))

    function = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        logits, labels, indices = inputs()
        results = []
        for bank, f in ((eager, run), (compiled, function)):
            value = f(bank, logits, labels, indices)
            results.append((value.detach(), torch.autograd.grad(value, logits)[0], bank.predictions, bank.seen))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [False, True])
def test_export(decomposed, training):
    """The exported program reads the rows, and in training mode writes them, as the module does."""

    class Model(torch.nn.Module):
        def __init__(self, bank):
            super().__init__()
            self.layer, self.bank = torch.nn.Linear(7, 7), bank

        def forward(self, x, labels, indices):
            return elr_loss(self.layer(x), labels, self.bank.rows(indices))

    model = Model(filled()).train(training)
    before = copy.deepcopy(model.bank)
    rows = torch.export.Dim("rows", min=2, max=20)
    x, labels, indices = inputs()
    shapes = ({0: rows}, {0: rows}, {0: rows})
    program = torch.export.export(copy.deepcopy(model), (x.detach(), labels, indices), dynamic_shapes=shapes)
    if decomposed:
        program = program.run_decompositions()
    exported = program.module()
    x, labels, indices = inputs(rows=9)
    torch.testing.assert_close(exported(x, labels, indices), model(x, labels, indices))
    held = dict(exported.named_buffers())
    assert torch.equal(held["bank.seen"], model.bank.seen)
    torch.testing.assert_close(held["bank.predictions"], model.bank.predictions)
    assert same(model.bank, before) == (not training)
