"""The probe against the figures computed by hand, within training, and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F

import sdfast
from sdfast.ntk import eigenspace, gram, information_gain, information_ratio
from sdfast.train import InformationProbe, SelfDistiller


def mlp(outputs=3):
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.Dropout(), torch.nn.Tanh(),
                               torch.nn.Linear(20, outputs))  # fmt: skip


def test_a_look_is_what_one_computes_by_hand():
    model, x = mlp(), torch.randn(40, 6)
    labels, clean = torch.randint(3, (2, 40))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = InformationProbe(x, labels, k=4, alpha=0.3, clean_labels=clean, center=True)
    probe(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    space = eigenspace(gram(model, x, outputs="trace"), 4)
    given, truth = F.one_hot(labels, 3).double(), F.one_hot(clean, 3).double()
    refined = 0.3 * given + 0.7 * F.one_hot(model(x).argmax(1), 3)
    (record,) = probe.records
    ratio = information_ratio(space, given, joint=True, center=True).item()
    assert record.given == pytest.approx(ratio, rel=1e-6)
    assert record.clean == pytest.approx(information_ratio(space, truth, joint=True, center=True).item(), rel=1e-6)
    gain = information_gain(space, given, refined, joint=True, center=True).item()
    assert record.gain == pytest.approx(gain, abs=1e-6)
    assert record.refined == pytest.approx(record.given + record.gain)
    assert record.gap == pytest.approx(space.gap)


def test_in_training():
    """Every second epoch of a run that it does not change."""
    x, labels = torch.randn(64, 6), torch.randint(3, (64,))
    batches = sdfast.data.Batches(x, labels, 32, seed=0)
    weights = []
    for callbacks in ([], [InformationProbe(x[:16], labels[:16], every=2)]):
        torch.manual_seed(0)
        model = mlp()
        distiller = SelfDistiller(model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5)
        history = distiller.fit(batches, 5, callbacks=callbacks, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    records = callbacks[0].records
    assert [record.call for record in records] == [1, 3, 5]
    assert history["information_ratio"] == [records[0].given, None, records[1].given, None, records[2].given]
    assert history["information_gain"][2] == records[1].gain


def test_one_output_and_real_targets():
    model, x = mlp(1), torch.randn(30, 6)
    labels = torch.randn(30).sign()
    probe = InformationProbe(x, labels, k=3)
    record = probe.look(model)
    assert record.clean is None
    assert 0 < record.given < 1
    trained = InformationProbe(x, labels, k=3, batch_norm="train")
    with pytest.warns(UserWarning, match="batch norm is in training mode"):
        assert trained.look(model).given != record.given


def test_three_hundred_looks_at_outputs_that_cancel():
    """Sums of the outputs are rounded by the outputs' size: near 0, as here at all times, they couple no samples."""
    x, sign = torch.randn(40, 6), torch.randn(40, 1).sign()
    model = torch.nn.Sequential(torch.nn.Linear(6, 48), torch.nn.Tanh(), torch.nn.Linear(48, 48), torch.nn.Tanh(),
                                torch.nn.Linear(48, 2))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    probe = InformationProbe(x, torch.cat([sign, -sign], 1), k=3)
    crossed = torch.zeros(40, dtype=torch.bool)
    for step in range(300):
        targets = 10 * torch.cos(torch.tensor(step / 20)) * probe.labels
        optimizer.zero_grad()
        before = model(x)
        F.mse_loss(before, targets).backward()
        optimizer.step()
        with torch.no_grad():
            crossed |= (model(x) * before).min(1).values < 0
        probe(model)
        if step % 60 == 59:
            fresh = eigenspace(gram(model, x, outputs="trace"), 3)
            assert torch.allclose(probe.space.values, fresh.values, rtol=1e-5)
    assert len(probe.records) == 300
    assert crossed.all()


def test_it_refines_labels_as_the_trainer_does():
    """The loss of the refined labels as plain targets is the loss that trains."""
    model, x = mlp(1).eval(), torch.randn(30, 6)
    signs = torch.randn(30, 1).sign()
    alpha, label_fn = sdfast.AdaptiveAlpha(0.8), sdfast.ClipLabel(0.2)
    probe = InformationProbe(x, signs, k=3, alpha=alpha, label_fn=label_fn)
    record = probe.look(model)
    trained = sdfast.self_distillation_loss(model(x), signs, alpha, label_fn=label_fn, loss="mse")
    assert F.mse_loss(model(x).double(), probe.refined).item() == pytest.approx(trained.item(), rel=1e-5)
    assert record.gain == pytest.approx(information_gain(probe.space, signs, probe.refined, joint=True).item())


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    probe = InformationProbe(torch.randn(20, 6), torch.randint(3, (20,)))
    with pytest.raises(ValueError, match="has not looked yet"):
        probe.plot(tmp_path / "probe.png")
    probe(mlp())
    probe.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.zeros(9)}, r"labels: got shape \(9,\), wanted a row for each of the 10"),
        ({"clean_labels": torch.zeros(9)}, "clean_labels: got shape"),
        ({"every": 0}, "every: got 0"),
        ({"k": 11}, "k: got 11, wanted 1 to 10"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"alpha": sdfast.AdaptiveAlpha(1.0, sync=True)}, "alpha: sync=True goes over processes"),
        ({"label_fn": "softmax"}, "label_fn: got 'softmax', wanted 'hardmax' with labels of int64"),
        ({"label_fn": sdfast.ClipLabel(0.1)}, "label_fn: got ClipLabel"),
        ({"labels": torch.ones(10), "label_fn": "hardmax"}, "label_fn: got 'hardmax', wanted 'identity' or a Clip"),
        ({"batch_norm": "both"}, "batch_norm: got 'both'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        InformationProbe(torch.randn(10, 6), **({"labels": torch.zeros(10, dtype=torch.int64)} | options))


def test_labels_that_do_not_go_with_the_outputs():
    with pytest.raises(ValueError, match="wanted 0 <= label < 3"):
        InformationProbe(torch.randn(10, 6), torch.full((10,), 3)).look(mlp())
    with pytest.raises(ValueError, match=r"wanted \(10, 3\) as the outputs"):
        InformationProbe(torch.randn(10, 6), torch.ones(10)).look(mlp())
