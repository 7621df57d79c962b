"""Every trainer in mixed precision and through torch.compile, and killed and resumed so."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sdfast import _files, baselines
from sdfast.data import Batches, Dataset, flip_labels
from sdfast.models import mlp
from sdfast.train import Recipe, SelfDistiller, distill_rounds, teacher_sweep

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=0.1)
OPTIONS = {"amp": {"amp": "bfloat16"}, "compile": {"compile": True}, "both": {"amp": "bfloat16", "compile": True}}


def data(rows=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    inputs = torch.randn(rows, 5, generator=generator) + 2 * F.one_hot(labels, 5)
    return Dataset(inputs[20:], labels[20:], inputs[:20], labels[:20], 3, "tiny")


LABELS = flip_labels(data().train_labels, 0.4, 3, generator=torch.Generator().manual_seed(0)).labels
SEEN = []


def network():
    model = mlp((5, 8, 3))
    model.register_forward_hook(lambda module, _, logits: SEEN.append(logits.dtype) if module.training else None)
    return model


def plain_network():
    return mlp((5, 8, 3))


def rounds(make, options, folder):
    found = distill_rounds(
        make, data(), 2, "brier", 1, recipe=replace(RECIPE, **options), labels=LABELS, folder=folder, progress=False
    )
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found.runs[0]]


def teacher(make, options, folder):
    recipe = replace(RECIPE, **options)
    found = teacher_sweep(
        make, make, data(), [1, 2], teacher=recipe, student=recipe, labels=LABELS, folder=folder, progress=False
    )
    return found.alone, [{k: v for k, v in record.items() if k != "seconds"} for record in found.runs[0]]


def co_teaching(make, options, folder):
    torch.manual_seed(0)
    model = baselines.TwoNetworks(make(), make())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    distiller = SelfDistiller(model, optimizer, method=baselines.co_teaching(0.3, 2), **options)
    checkpoint = None if folder is None else folder / "run.pt"
    batches = Batches(data().train_inputs, LABELS, 16)
    history = distiller.fit(batches, 3, checkpoint=checkpoint, progress=False)
    weights = [value.tolist() for value in model.state_dict().values()]
    return weights, [record._replace(seconds=0.0)._asdict() for record in history]


TRAINERS = {"rounds": rounds, "teacher": teacher, "co-teaching": co_teaching}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_mixed_precision_reaches_every_network(trainer):
    SEEN.clear()
    TRAINERS[trainer](network, OPTIONS["amp"], None)
    assert set(SEEN) == {torch.bfloat16}


def leaves(value):
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [leaf for part in parts for leaf in leaves(part)]
    return [value]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_compiled_it_trains_to_the_same(trainer, monkeypatch):
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile(model))
    found = leaves(TRAINERS[trainer](plain_network, OPTIONS["compile"], None))
    assert compiled
    wanted = leaves(TRAINERS[trainer](plain_network, {}, None))
    assert [value is None for value in found] == [value is None for value in wanted]
    for value, other in zip(found, wanted, strict=True):
        assert value is None or value == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_goes_on_from_what_it_wrote(trainer, options, tmp_path, monkeypatch):
    """Killed in its third writing, then resumed: the figures of an uninterrupted one, to the last bit."""
    chosen = OPTIONS[options]
    if "compile" in chosen:
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="aot_eager"))
    whole = TRAINERS[trainer](plain_network, chosen, None)
    write, written = _files.write_atomically, []

    def stopping(path, content):
        written.append(path)
        if len(written) == 3 - (trainer == "rounds"):
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(_files, "write_atomically", stopping)
        with pytest.raises(KeyboardInterrupt):
            TRAINERS[trainer](plain_network, chosen, tmp_path)
    assert list(tmp_path.iterdir())
    assert TRAINERS[trainer](plain_network, chosen, tmp_path) == whole
