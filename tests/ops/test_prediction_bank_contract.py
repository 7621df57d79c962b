"""What PyTorch promises of a loss that writes to a bank: autograd, compile, checkpoints, scaling, processes."""

import copy
import io
import warnings

import pytest
import torch
from bank_cases import LOSSES, filled, inputs, same
from helpers import DTYPES, backends, interpreted
from torch.utils.checkpoint import checkpoint

from sdfast import PredictionBank, elr_loss, self_distillation_loss
from sdfast.ops.prediction_bank.description import BankDescription, packed
from sdfast.ops.self_distillation import description

BACKENDS = backends()
ALL = ["reference", *BACKENDS]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    logits, labels, indices = inputs(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for storage in ({}, {"dtype": torch.bfloat16}, {"top_k": 2}):
        for update, strength, late in ((True, 0.0, False), (True, 3.0, True), (False, 0.0, False)):
            bank = filled(**storage)
            loss = description.packed(description.Description(0.4, False, 0, 0.5, 0, 1, -100, 0.0), True, True)
            settings = BankDescription(0.6, True, False, 0, False, update, strength)
            torch.library.opcheck(
                torch.ops.sdfast._prediction_bank.default,
                (logits.detach(), labels, torch.rand((), dtype=wide), indices, *bank.storage(), None,
                 torch.rand(12, dtype=wide), *packed(loss, settings, late)),
            )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_and_retained_graphs(backend, dtype, reduction, loss):
    logits, labels, indices = inputs(dtype=dtype)
    bank = filled().eval()

    def run(which, upstream):
        value = LOSSES[loss](logits, labels, bank.rows(indices), reduction=reduction, backend=which)
        first = torch.autograd.grad(value, logits, upstream.to(value), retain_graph=True)[0].clone()
        torch.autograd.grad(value, logits, 3 * upstream.to(value), retain_graph=True)
        last = torch.autograd.grad(value, logits, upstream.to(value))[0]
        torch.testing.assert_close(last, first)
        return first

    rows = (torch.randn(12), torch.zeros(12), torch.ones(1).expand(12), torch.randn(24)[::2])
    scalars = tuple(map(torch.tensor, (1.0, -3.5, 0.0)))
    for upstream in rows if reduction == "none" else scalars:
        torch.testing.assert_close(run(backend, upstream), run("reference", upstream))


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_saves_float16_gradients(backend, scale):
    rows = 64 if interpreted(backend) else 4096
    bank = PredictionBank(4096, 200).eval()
    logits, labels = torch.randn(rows, 200).half(), torch.randint(200, (rows,))
    gradients = []
    for which, x, factor in ((backend, logits, scale), ("reference", logits.double(), 1)):
        x = x.requires_grad_()
        loss = self_distillation_loss(x, labels, 0.5, source=bank.rows(torch.arange(rows)), backend=which)
        (loss * factor).backward()
        gradients.append(x.grad.double() / factor)
    assert (gradients[0] - gradients[1]).abs().max() <= 2**-11 * gradients[1].abs().max() + 2**-24 / scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_amp_step_leaves_a_sound_bank(backend):
    """The scaler skips the step after an overflow; rows of finite logits are predictions all the same."""
    bank = PredictionBank(20, 7)
    layer = torch.nn.Linear(7, 7)
    optimizer, scaler = (
        torch.optim.SGD(layer.parameters(), 0.1),
        torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**4),
    )
    for bad in (False, True, False):
        x, labels, indices = inputs()
        weight = layer.weight.detach().clone()
        x = x.detach()
        x[3] = torch.inf if bad else x[3]
        before = bank.seen.clone()
        scaler.scale(
            self_distillation_loss(layer(x), labels, 0.4, source=bank.rows(indices), backend=backend)
        ).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(layer.weight, weight) == bad
        assert (bank.seen - before).sum() == 12 - bad
        assert (bank.seen - before)[indices[3]] == 1 - bad
        assert bank.predictions.isfinite().all()
        torch.testing.assert_close(bank.predictions.sum(-1), (bank.seen > 0).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_a_clear_error(backend):
    logits, labels, indices = inputs()
    bank = filled()
    for reduction in ("mean", "none"):
        loss = elr_loss(logits, labels, bank.rows(indices), reduction=reduction, backend=backend).sum()
        with pytest.raises(RuntimeError, match=r"no second derivative; pass backend='reference'"):
            torch.autograd.grad(loss, logits, create_graph=True)
    loss = elr_loss(logits, labels, bank.rows(indices), backend="reference")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), logits)[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_not_copied_and_inputs_are_not_touched(backend):
    logits, labels, indices = inputs()
    given = [logits.detach().clone(), labels.clone(), indices.clone()]
    loss = elr_loss(logits, labels, filled().rows(indices), backend=backend)
    written = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert logits.grad.data_ptr() == written
    assert all(torch.equal(a.detach(), b) for a, b in zip((logits, labels, indices), given, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_write_is_seen_by_autograd(backend):
    """A tensor of the bank that another graph has saved may not change unnoticed."""
    bank = filled()
    logits, labels, indices = inputs()
    other = (torch.ones(20, 7).requires_grad_() * bank.predictions).sum()
    elr_loss(logits, labels, bank.rows(indices), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("order", ["read_then_write", "write_then_read"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ALL)
def test_activation_checkpointing(backend, reentrant, order, loss):
    """The recomputation writes, once; value, gradient and bank are those without a checkpoint, bit for bit."""
    logits, labels, indices = inputs()
    plain = filled(order=order)
    for outside in (False, True):  # whether the handle is made outside of what is checkpointed
        held = copy.deepcopy(plain)
        results = []
        for bank, wrap in ((copy.deepcopy(plain), lambda f, x: f(x)), (held, None)):
            rows = bank.rows(indices)

            def run(x, bank=bank, rows=rows):
                handle = rows if outside else bank.rows(indices)  # noqa: B023
                return LOSSES[loss](x * 2, labels, handle, backend=backend)

            before = bank.seen.clone()
            if wrap is None:
                value = checkpoint(run, logits, use_reentrant=reentrant)
                assert torch.equal(bank.seen, before)
            else:
                value = wrap(run, logits)
            logits.grad = None
            value.backward()
            assert (bank.seen - before).sum() == 12
            results.append((value.detach(), logits.grad, bank))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        assert same(results[0][2], results[1][2])


def test_nested_checkpoints_write_once():
    logits, labels, indices = inputs()
    bank = filled()
    before = bank.seen.clone()

    def inner(x):
        return elr_loss(x, labels, bank.rows(indices))

    value = checkpoint(lambda x: checkpoint(inner, x * 2, use_reentrant=False) * 3, logits, use_reentrant=False)
    value.backward()
    assert (bank.seen - before).sum() == 12


def test_functorch_is_refused():
    logits, labels, indices = inputs()
    bank = filled()
    before = copy.deepcopy(bank)
    for loss in LOSSES.values():
        for backend in (None, "reference"):
            with pytest.raises(NotImplementedError, match="written as it is read"):
                torch.func.grad(lambda x, f=loss, b=backend: f(x, labels, bank.rows(indices), backend=b))(
                    logits.detach()
                )
    assert same(before, bank)


@pytest.mark.parametrize("top_k", [None, 3])
def test_state_dict_round_trip_and_resume(top_k):
    """A run that stops and goes on from the saved state ends with the same bits."""
    batches = [inputs() for _ in range(4)]

    def train(bank, part):
        for logits, labels, indices in part:
            self_distillation_loss(logits, labels, 0.4, source=bank.rows(indices))
        return bank

    whole = train(PredictionBank(20, 7, top_k=top_k), batches)
    first = train(PredictionBank(20, 7, top_k=top_k), batches[:2])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = PredictionBank(20, 7, top_k=top_k)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert same(first, second)
    assert same(train(second, batches[2:]), whole)
    with pytest.raises(ValueError, match=r"momentum: the saved bank has 0.9, this one 0.5"):
        PredictionBank(20, 7, 0.5, top_k=top_k).load_state_dict(first.state_dict())


def test_moving_never_casts():
    bank = filled()
    before = bank.predictions.clone()
    model = torch.nn.ModuleDict({"bank": bank}).half()
    assert torch.equal(model["bank"].predictions, before)
    assert bank.to(torch.float64).predictions.dtype == torch.float32
    assert bank.to("meta").predictions.device.type == "meta"
    assert filled(dtype=torch.bfloat16).float().predictions.dtype == torch.bfloat16
    assert list(bank.parameters()) == []


def gather_worker(rank, path, top_k, world):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(7)
    logits = [torch.randn(20, 6, generator=generator) for _ in range(3)]
    labels = torch.zeros(20, dtype=torch.int64)
    bank, alone = (PredictionBank(20, 6, 0.5, dtype=torch.bfloat16, top_k=top_k) for _ in range(2))
    for epoch, each in enumerate(logits):
        order = torch.randperm(20, generator=generator)  # the samples change hands between epochs
        mine = order[rank::world]
        elr_loss(each[mine].requires_grad_(), labels[mine], bank.rows(mine))
        elr_loss(each.detach().requires_grad_(), labels, alone.rows(torch.arange(20)))
        bank.gather()
        assert torch.equal(bank.probabilities(), alone.probabilities()), epoch
        assert torch.equal(bank.seen, alone.seen)
    twice = torch.tensor([3])  # seen by all, most often by the last
    for _ in range(rank + 1):
        elr_loss((logits[0][twice] + rank).requires_grad_(), labels[twice], bank.rows(twice))
    bank.gather()
    assert bank.seen[3] == alone.seen[3] + world
    before = bank.probabilities()
    bank.gather()  # nobody has seen anything since
    assert torch.equal(bank.probabilities(), before)
    with pytest.raises(ValueError, match="num_classes: the processes' banks have from 6 to 7, wanted the same in all"):
        PredictionBank(20, 7 if rank == 1 else 6).gather()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("top_k", "world"), [(None, 2), (2, 2), (None, 3)])
def test_gather_over_processes(tmp_path, top_k, world):
    """Of three, the last has a sample fewer than the others."""
    torch.multiprocessing.spawn(gather_worker, (str(tmp_path / "store"), top_k, world), nprocs=world)


def test_gather_without_processes_is_an_error():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        filled().gather()


@pytest.mark.parametrize("top_k", [None, 3])
def test_suspected_labels_and_noise_rate(top_k):
    bank = PredictionBank(6, 5, top_k=top_k)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    assert torch.tensor(bank.noise_rate(labels)).isnan()
    believed = torch.tensor([0, 1, 4, 3, 2, 0])  # two labels are wrong
    logits = 4 * torch.eye(5)[believed] * torch.tensor([1, 1, 0.5, 1, 1, 1])[:, None]
    elr_loss(logits[:5].requires_grad_(), labels[:5], bank.rows(torch.arange(5)))
    assert bank.noise_rate(labels) == pytest.approx(2 / 5)  # sample 5 has not been seen
    suspects = bank.suspected_labels(labels, 2)
    assert suspects.indices.tolist() == [4, 2]
    assert suspects.predicted.tolist() == [2, 4]
    assert (suspects.disagreement > 0).all()
    assert len(bank.suspected_labels(labels, 6).indices) == 5


@pytest.mark.parametrize("top_k", [None, 3])
def test_start_from_labels(top_k):
    """SELC's rule: from t = y, t ← β t + (1 − β) p."""
    bank, labels = PredictionBank(4, 6, 0.9, bias_correction=False, top_k=top_k, warm_up=2), torch.tensor([5, 0, 2, 1])
    bank.start_from(labels)
    one_hot = torch.nn.functional.one_hot(labels, 6).float()
    assert torch.equal(bank.probabilities(), one_hot)
    logits = torch.randn(4, 6).requires_grad_()
    loss = self_distillation_loss(logits, labels, 0.0, source=bank.rows(torch.arange(4)), label_fn="softmax")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    if top_k is None:
        torch.testing.assert_close(bank.probabilities(), 0.9 * one_hot + 0.1 * logits.detach().softmax(-1))


def test_no_temporary_of_the_batch_is_made():
    """Beside the gradient nothing of the batch's size is allocated, forward and backward."""
    rows, classes = 512, 1000
    bank, labels, indices = PredictionBank(600, classes), torch.randint(classes, (rows,)), torch.randperm(600)[:rows]
    logits = torch.randn(rows, classes).requires_grad_()
    for loss in LOSSES.values():
        loss(logits, labels, bank.rows(indices)).backward()
        logits.grad = None
        with torch.profiler.profile(profile_memory=True) as profile:
            loss(logits, labels, bank.rows(indices)).backward()
        taken = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert sum(size for size in taken if size > 0) < 1.1 * rows * classes * 4


def test_modules_forward_to_the_functions():
    from sdfast.nn import ELRLoss, SelfDistillationLoss

    logits, labels, indices = inputs()
    bank = filled().eval()
    module = SelfDistillationLoss(0.4, label_fn="softmax")
    want = self_distillation_loss(logits, labels, 0.4, label_fn="softmax", source=bank.rows(indices))
    assert torch.equal(module(logits, labels, source=bank.rows(indices)), want)
    weight, row_weight = torch.rand(7), torch.rand(12)
    module = ELRLoss(bank, strength=3.0, clamp=0.01, class_weight=weight, label_smoothing=0.1, reduction="sum")
    want = elr_loss(logits, labels, bank.rows(indices), strength=3.0, clamp=0.01, class_weight=weight,
                    label_smoothing=0.1, reduction="sum", row_weight=row_weight)  # fmt: skip
    assert torch.equal(module(logits, labels, indices, row_weight=row_weight), want)
    assert "strength=3.0, clamp=0.01" in repr(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="strength: got -1"):
            ELRLoss(bank, strength=-1)
        with pytest.raises(TypeError, match=r"class_weight: got list, wanted a torch\.Tensor"):
            ELRLoss(bank, class_weight=[1, 2, 3, 4, 5, 6, 7])
