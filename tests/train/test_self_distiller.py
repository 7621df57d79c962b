"""SelfDistiller.fit is the loop one would write by hand, bit for bit, and its records are right."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

import sdfast
from sdfast.data import Batches, flip_labels
from sdfast.models import mlp
from sdfast.train import SelfDistiller

ROWS, CLASSES = 90, 4


def toy(rows=ROWS):
    """Four blurred corners: inputs, noisy labels, true labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % CLASSES
    inputs = torch.stack([labels % 2, labels // 2], 1) + 0.3 * torch.randn(rows, 2, generator=generator)
    return inputs, flip_labels(labels, 0.3, CLASSES, generator=generator).labels, labels


def parts(seed=0, lr=0.2, **optimizer_options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES))
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **optimizer_options)


def batches(**options):
    inputs, labels, _ = toy()
    return Batches(inputs, labels, 16, **options)


def fit(train=None, epochs=2, eval=None, model_and_optimizer=None, clean_labels=None, callbacks=(), **options):
    model, optimizer = model_and_optimizer or parts()
    distiller = SelfDistiller(model, optimizer, **{"alpha": 0.5, **options})
    history = distiller.fit(
        batches() if train is None else train,
        epochs,
        eval=eval,
        callbacks=callbacks,
        progress=False,
        clean_labels=clean_labels,
    )
    return distiller, history


def assert_same_weights(first, second):
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def by_hand(model, optimizer, train, epochs, alpha, scheduler=None, **options):
    for epoch in range(epochs):
        if hasattr(train, "set_epoch"):
            train.set_epoch(epoch)
        for inputs, labels in train:
            optimizer.zero_grad()
            loss = sdfast.self_distillation_loss(model(inputs), labels, alpha, **options)
            loss.backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize(
    ("alpha", "options"),
    [
        (1.0, {}),
        (sdfast.AdaptiveAlpha(1.0), {}),
        (0.4, {"label_fn": "softmax", "temperature": 0.5, "loss": "kl", "label_smoothing": 0.1}),
        (torch.tensor(0.7), {"loss": "mse", "ignore_index": 3}),
        (0.5, {"class_weight": torch.tensor([1.0, 2.0, 3.0, 4.0]), "backend": "reference"}),
    ],
)
@pytest.mark.parametrize("loader", ["batches", "dataloader"])
def test_equals_a_loop_written_by_hand(alpha, options, loader):
    inputs, labels, _ = toy()

    def train():
        if loader == "batches":
            return Batches(inputs, labels, 16)
        return DataLoader(TensorDataset(inputs, labels), 16, shuffle=True)

    model, optimizer = parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    by_hand(model, optimizer, train(), 3, alpha, scheduler, **options)

    own_model, own_optimizer = parts()
    own_scheduler = torch.optim.lr_scheduler.StepLR(own_optimizer, 1, 0.5)
    distiller, history = fit(
        train(), 3, model_and_optimizer=(own_model, own_optimizer), alpha=alpha, scheduler=own_scheduler, **options
    )
    assert_same_weights(model, distiller.model)
    assert history["learning_rate"] == [0.2, 0.1, 0.05]


def test_the_records_are_those_of_the_forward_passes_that_trained():
    inputs, labels, clean = toy()
    model, optimizer = parts(lr=0.05)
    train = Batches(inputs, labels, 16, shuffle=False, with_indices=True)
    seen = []
    hook = model.register_forward_hook(lambda module, _, logits: seen.append(logits.detach().clone()))
    _, history = fit(
        train, 1, model_and_optimizer=(model, optimizer), alpha=sdfast.AdaptiveAlpha(0.8), clean_labels=clean
    )
    hook.remove()

    losses, alphas = [], []
    for logits, given in zip(seen, labels.split(16), strict=True):
        value, stats = sdfast.self_distillation_loss(
            logits, given, sdfast.AdaptiveAlpha(0.8), return_stats=True, backend="reference"
        )
        losses += [float(value)] * len(given)
        alphas += [float(stats.alpha)] * len(given)
    predictions = torch.cat(seen).argmax(-1)
    record = history.last
    assert record.epoch == 1
    assert record.loss == pytest.approx(sum(losses) / ROWS, rel=1e-6)
    assert record.alpha == pytest.approx(sum(alphas) / ROWS, rel=1e-6)
    assert record.accuracy == pytest.approx(float((predictions == labels).float().mean()), rel=1e-6)
    assert record.clean_accuracy == int((predictions == clean).sum()) / ROWS
    assert record.eval_accuracy is None
    assert record.seconds > 0


def test_ignored_rows_count_in_no_record():
    inputs, labels, _ = toy()
    holes = labels.clone()
    holes[::3] = -100
    kept = holes != -100
    _, wanted = fit([(inputs[kept], labels[kept])], 1, model_and_optimizer=_without_dropout(parts()))
    _, history = fit([(inputs, holes)], 1, model_and_optimizer=_without_dropout(parts()))
    assert history.last.loss == pytest.approx(wanted.last.loss, rel=1e-6)
    assert history.last.accuracy == pytest.approx(wanted.last.accuracy, rel=1e-6)


def _without_dropout(model_and_optimizer):
    model_and_optimizer[0][2].p = 0.0
    return model_and_optimizer


def test_the_evaluation_is_in_evaluation_mode_and_changes_nothing():
    inputs, _, clean = toy()
    model, optimizer = parts()
    distiller, history = fit(eval=[(inputs, clean), (inputs[:5], clean[:5])], model_and_optimizer=(model, optimizer))
    assert model.training
    model.eval()
    with torch.no_grad():
        right = model(inputs).argmax(-1) == clean
    assert history.last.eval_accuracy == (int(right.sum()) + int(right[:5].sum())) / (ROWS + 5)
    assert distiller.evaluate(Batches(inputs, clean, 7, shuffle=False)) == int(right.sum()) / ROWS
    assert not model.training
    plain, _ = fit()
    assert_same_weights(plain.model, model)


def test_alpha_may_be_a_function_of_epoch_and_step():
    calls = []

    def schedule(epoch, step):
        calls.append((epoch, step))
        return 1 - 0.05 * step

    _, history = fit(alpha=schedule)
    assert calls == [(step // 6, step) for step in range(12)]
    sizes = [16] * 5 + [10]
    wanted = [sum((1 - 0.05 * (6 * epoch + i)) * size for i, size in enumerate(sizes)) / ROWS for epoch in (0, 1)]
    assert history["alpha"] == pytest.approx(wanted, rel=1e-6)
    assert_same_weights(fit(alpha=lambda epoch, step: 0.5)[0].model, fit(alpha=0.5)[0].model)


def test_a_scheduler_may_step_with_every_batch():
    model, optimizer = parts()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=12)
    _, history = fit(model_and_optimizer=(model, optimizer), scheduler=scheduler, scheduler_step="step")
    assert scheduler.last_epoch == 12
    assert history["learning_rate"][0] == pytest.approx(1 / 25)


def test_callbacks_see_every_epoch_and_may_end_the_training():
    seen = []

    def record(distiller, history):
        seen.append((len(history), distiller.optimizer.param_groups[0]["lr"]))
        return "go on"  # only True itself ends it

    def stop(distiller, history):
        return len(history) == 2

    _, history = fit(epochs=9, callbacks=[stop, record])
    assert seen == [(1, 0.2), (2, 0.2)]
    assert len(history) == 2


class Indexed(Dataset):
    def __init__(self):
        self.inputs, self.labels, self.clean = toy()

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return self.inputs[row], self.labels[row], row


def test_a_loader_of_triples_is_measured_against_the_clean_labels():
    data = Indexed()
    loader = DataLoader(data, 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    _, history = fit(loader, 25, clean_labels=data.clean, alpha=sdfast.AdaptiveAlpha(1.0))
    assert history.last.clean_accuracy > 0.85 > history.last.accuracy  # it learned the corners, not the noise


def test_the_samplers_epoch_is_set():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    data = Indexed()
    sampler = Sampler(data)
    fit(DataLoader(data, 32, sampler=sampler), 3)
    assert sampler.epochs == (0, 1, 2)


def test_binary_labels_of_one_output():
    inputs, _, clean = toy()
    signs = (clean % 2 * 2 - 1).float()[:, None]
    torch.manual_seed(0)
    model = mlp((2, 16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [(inputs, signs)]
    _, history = fit(
        data,
        60,
        eval=data,
        model_and_optimizer=(model, optimizer),
        loss="mse",
        label_fn=sdfast.ClipLabel(0.2),
        alpha=0.6,
    )
    assert history.last.eval_accuracy > 0.9


@pytest.mark.parametrize("amp", ["bfloat16", torch.bfloat16])
def test_bfloat16_is_autocast(amp):
    seen = []
    model, optimizer = parts()
    model.register_forward_hook(lambda module, _, logits: seen.append(logits.dtype))
    inputs, _, clean = toy()
    _, history = fit(epochs=15, eval=[(inputs, clean)], model_and_optimizer=(model, optimizer), amp=amp, alpha=0.6)
    assert set(seen) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert history.last.eval_accuracy > 0.8


def test_compile_trains_to_the_same_weights():
    compiled, history = fit([toy()[:2]], model_and_optimizer=_without_dropout(parts()), compile=True)
    plain, wanted = fit([toy()[:2]], model_and_optimizer=_without_dropout(parts()))
    for value, other in zip(compiled.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other)
    assert history["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())  # no prefix of torch.compile


class HostReads(TorchDispatchMode):
    """Counts every reading of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


def test_the_host_reads_no_more_per_step_than_a_hand_written_loop():
    inputs, labels, clean = toy()
    excess = []
    for batch_size in (45, 5):
        train = Batches(inputs, labels, batch_size, with_indices=True)
        with HostReads() as own:
            fit(train, 2, eval=train, clean_labels=clean, alpha=sdfast.AdaptiveAlpha(1.0))
        with HostReads() as hand:
            by_hand(*parts(), Batches(inputs, labels, batch_size), 2, sdfast.AdaptiveAlpha(1.0))
        excess.append(own.count - hand.count)
    assert excess[0] == excess[1]  # 2 steps an epoch or 18


def test_a_nan_loss_is_an_error_that_names_the_epoch():
    inputs, labels, _ = toy()
    poisoned = inputs.clone()
    poisoned[3] = math.nan
    model, optimizer = parts()
    distiller = SelfDistiller(model, optimizer, alpha=0.5)
    with pytest.raises(
        FloatingPointError, match="train: the loss of epoch 1 is nan; look for NaN in the inputs"
    ) as caught:
        distiller.fit([(poisoned, labels)], 3, progress=False)
    assert math.isnan(caught.value.history.last.loss)
    history = distiller.fit([(poisoned, labels)], 3, progress=False, allow_nan=True)
    assert len(history) == 3
    assert all(map(math.isnan, history["loss"]))


def test_the_progress_bar_stays_off_stdout(capfd):
    model, optimizer = parts()
    SelfDistiller(model, optimizer, alpha=0.5).fit(batches(), 2)
    out, err = capfd.readouterr()
    assert out == err == ""  # and off anything that is no terminal


MODEL, OPTIMIZER = parts()
ADAM_OF_OTHERS = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau(OPTIMIZER)
FOREIGN = torch.optim.lr_scheduler.StepLR(ADAM_OF_OTHERS, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": len}, TypeError, "model: got builtin_function_or_method, wanted a torch.nn.Module"),
        ({"optimizer": "sgd"}, TypeError, "optimizer: got str, wanted a torch.optim.Optimizer"),
        ({"optimizer": ADAM_OF_OTHERS}, ValueError, "optimizer: holds no parameter of model"),
        ({"scheduler": 3}, TypeError, "scheduler: got int, wanted a torch.optim.lr_scheduler.LRScheduler"),
        ({"scheduler": FOREIGN}, ValueError, "scheduler: belongs to another optimizer than the one given"),
        ({"scheduler": PLATEAU}, NotImplementedError, "scheduler: ReduceLROnPlateau wants a figure at each step"),
        ({"scheduler_step": "batch"}, ValueError, "scheduler_step: got 'batch', wanted one of 'epoch', 'step'"),
        ({"amp": "int8"}, ValueError, "amp: got 'int8', wanted one of 'bfloat16', 'float16'"),
        ({"amp": torch.int8}, ValueError, "amp: got 'torch.int8', wanted one of 'bfloat16', 'float16'"),
        ({"amp": torch.float16}, NotImplementedError, "amp: got 'float16' on the CPU"),
        ({"backend": "cuda"}, NotImplementedError, "backend='cuda': "),
        ({"amp": "float16"}, NotImplementedError, "amp: got 'float16' on the CPU"),
        ({"device": "gpu"}, ValueError, "device: got 'gpu', which torch cannot compute on here"),
        ({"device": "meta"}, ValueError, "device: got 'meta', which torch cannot compute on here"),
        ({"alpha": -0.1}, ValueError, "alpha: got -0.1, wanted within [0, 1]"),
        ({"alpha": math.nan}, ValueError, "alpha: got nan, wanted a finite number"),
        ({"alpha": "adaptive"}, TypeError, "alpha: got str"),
        ({"label_fn": "argmax"}, ValueError, "label_fn: got 'argmax'"),
        ({"temperature": 2.0}, ValueError, "temperature: got 2.0, but only label_fn='softmax' has one"),
        ({"loss": "nll"}, ValueError, "loss: got 'nll'"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
    ],
)
def test_impossible_parts(changes, error, message):
    arguments = {"model": MODEL, "optimizer": OPTIMIZER, "alpha": 0.5, **changes}
    with pytest.raises(error) as caught:
        SelfDistiller(arguments.pop("model"), arguments.pop("optimizer"), **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


X, Y, CLEAN = toy()


@pytest.mark.parametrize(
    ("train", "options", "error", "message"),
    [
        (X, {}, TypeError, "train: got Tensor, wanted an iterable of (inputs, labels) batches"),
        (5, {}, TypeError, "train: got int, wanted an iterable of (inputs, labels) batches"),
        (iter([(X, Y)]), {}, ValueError, "train: got an iterator, which is used up after one epoch"),
        ([], {}, ValueError, "train: gave no batch in an epoch"),
        ([X], {}, TypeError, "train: got a batch that is a Tensor of 90, wanted (inputs, labels)"),
        ([(X,)], {}, TypeError, "train: got a batch that is a tuple of 1, wanted (inputs, labels)"),
        ([(X, Y.tolist())], {}, TypeError, "train: labels of a batch: got list, wanted a torch.Tensor"),
        ([(X, Y[:5])], {}, ValueError, "labels: got int64 of shape (5,), wanted (90,) indices"),
        ([(X, Y + 1)], {}, IndexError, "labels: "),
        ([(X, Y)], {"epochs": 0}, ValueError, "epochs: got 0, wanted an integer >= 1"),
        ([(X, Y)], {"epochs": 1.5}, ValueError, "epochs: got 1.5, wanted an integer >= 1"),
        ([(X, Y)], {"eval": 3}, TypeError, "eval: got int, wanted an iterable"),
        ([(X, Y)], {"eval": [(X,)]}, TypeError, "eval: got a batch that is a tuple of 1"),
        ([(X, Y)], {"clean_labels": CLEAN}, ValueError, "clean_labels: the batches of train carry no indices"),
        ([(X, Y)], {"clean_labels": [1]}, TypeError, "clean_labels: got list, wanted a torch.Tensor"),
    ],
)
def test_bad_batches(train, options, error, message):
    model, optimizer = parts()
    with pytest.raises(error) as caught:
        SelfDistiller(model, optimizer, alpha=0.5).fit(train, **{"epochs": 1, "progress": False, **options})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_schedule_out_of_range_is_refused_at_its_step():
    with pytest.raises(ValueError, match=r"alpha: got 1\.5, wanted within \[0, 1\]"):
        fit(alpha=lambda epoch, step: 0.5 + step)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_trains_on_a_gpu(amp):
    inputs, labels, clean = toy()
    train = Batches(inputs, labels, 16, device="cuda", with_indices=True)
    _, history = fit(
        train, 25, eval=[(inputs, clean)], clean_labels=clean, alpha=sdfast.AdaptiveAlpha(1.0), device="cuda", amp=amp
    )
    assert history.last.eval_accuracy > 0.85


class Watched:
    """Batches during whose steps, the first apart, torch refuses to let the host wait for the GPU."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        try:
            for batch in self.batches:
                yield batch
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_no_step_on_a_gpu_waits_for_it(amp):
    inputs, labels, clean = toy()
    train = Batches(inputs, labels, 16, device="cuda", with_indices=True)
    fit(Watched(train), 2, clean_labels=clean, alpha=sdfast.AdaptiveAlpha(1.0), device="cuda", amp=amp)


@pytest.mark.parametrize("loader", ["batches", "dataloader", "list"])
def test_too_few_clean_labels_are_named(loader):
    inputs, labels, clean = toy()
    rows = torch.arange(ROWS)
    train = {
        "batches": Batches(inputs, labels, 16, with_indices=True),
        "dataloader": DataLoader(TensorDataset(inputs, labels, rows), 16),
        "list": [(inputs, labels, rows)],
    }[loader]
    message = (
        "has 80 rows, but a batch carries indices 0 to 89" if loader == "list" else r"got shape \(80,\), wanted a row"
    )
    with pytest.raises(ValueError, match=f"clean_labels: {message}"):
        fit(train, clean_labels=clean[:80])


def test_classes_of_uint8_are_none_of_them_ignored():
    inputs, _, _ = toy()
    torch.manual_seed(0)
    model = mlp((2, 8, 200))
    labels = torch.full((ROWS,), 156, dtype=torch.uint8)  # -100 in eight bits
    _, history = fit(
        [(inputs, labels)], 1, model_and_optimizer=(model, torch.optim.SGD(model.parameters(), lr=0.1)), alpha=1.0
    )
    assert history.last.loss > 1


def test_what_its_owner_froze_stays_frozen():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    model[1].eval()
    before = model[1].running_mean.clone()
    inputs, labels, _ = toy()
    distiller, _ = fit(
        epochs=2, eval=[(inputs, labels)], model_and_optimizer=(model, torch.optim.SGD(model.parameters(), lr=0.1))
    )
    assert torch.equal(model[1].running_mean, before)
    distiller.evaluate([(inputs, labels)])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    model.eval()
    distiller.fit(batches(), 1, progress=False)
    assert not torch.equal(model[1].running_mean, before)
    assert not any(module.training for module in model.modules())


def test_an_alpha_of_none_is_refused():
    with pytest.raises(TypeError, match="alpha: the function gave None for epoch 0, step 1, wanted a number"):
        fit(alpha=lambda epoch, step: 0.5 if step == 0 else None)


def test_data_without_a_row_that_counts_are_named():
    inputs, labels, _ = toy()
    ignored = torch.full_like(labels, -100)
    with pytest.raises(ValueError, match="train: no row of epoch 1 counts: its labels are all ignore_index"):
        fit([(inputs, ignored)])
    for nothing in ([], [(inputs, ignored)]):
        with pytest.raises(ValueError, match="eval: gave no row that counts"):
            fit(eval=nothing)
