"""What figures 2 and 5 and the predicted rounds rest on."""

import math
from itertools import islice

import pytest
import torch

from sdfast.data import Batches
from sdfast.experiments import dong2019_figure2, dong2019_figure5, rounds_predicted
from sdfast.experiments.dong2019_figure5 import Stretches
from sdfast.experiments.task import load_signs, load_task


def rows(batches):
    return [batch[0].tolist() for batch in batches]


def test_stretches_are_the_passes_cut_anew():
    inputs, labels = torch.arange(10.0), torch.zeros(10)
    whole = Batches(inputs, labels, 4, seed=1)  # 3 batches a pass
    wanted = [batch for _ in range(4) for batch in rows(whole)]
    stretches = Stretches(Batches(inputs, labels, 4, seed=1), 5)
    assert len(stretches) == 5
    assert [batch for _ in range(2) for batch in rows(stretches)] == wanted[:10]
    again = Stretches(Batches(inputs, labels, 4, seed=1), 5)
    again.set_epoch(1)  # as a resumed training does
    assert rows(again) == wanted[5:10]
    again.set_epoch(0)
    assert rows(islice(again, 2)) == wanted[:2]
    again.set_epoch(1)  # a stretch that was left early
    assert rows(again) == wanted[5:10]


def test_signs_are_the_classes_against_the_rest():
    settings = dong2019_figure2.Settings()
    data, given, true = load_signs(settings, 0, 0.4)
    plain, _ = load_task(settings, 0, 0.0)
    assert torch.equal(true[:, 0] > 0, (plain.train_labels == 2) | (plain.train_labels == 7))
    assert data.num_classes == 1
    assert set(given.unique().tolist()) == {-1.0, 1.0}
    assert float((given != true).double().mean()) == pytest.approx(0.2, abs=0.04)  # half of the redrawn stay


def test_a_random_vector_holds_the_root_of_k_over_n():
    space = torch.linalg.qr(torch.randn(128, 5, dtype=torch.float64)).Q
    vectors = torch.randn(128, 4000, dtype=torch.float64)
    ratio = (space.mT @ vectors).norm() / vectors.norm()
    assert float(ratio) == pytest.approx(dong2019_figure2.chance(dong2019_figure2.Settings()), rel=0.02)


def curves(given, refined):
    ratios = {"given": given, "refined": refined, "true": given}
    return {"plain": ratios, "centred": ratios, "wrong_labels": 0.2}


def test_a_gain_is_counted_look_by_look():
    settings = dong2019_figure5.Settings(iterations=60)
    good = curves([0.5] * 4, [0.5, 0.6, 0.7, 0.8])
    bad = curves([0.5] * 4, [0.4, 0.6, 0.4, 0.8])
    assert dong2019_figure5.gains(good, "plain") == pytest.approx([0, 0.1, 0.2, 0.3])
    holds = dong2019_figure5.summarise(settings, dict(enumerate([good] * 5)))
    assert [claim.holds for claim in holds.claims] == [True] * 4
    mixed = dong2019_figure5.summarise(settings, dict(enumerate([bad] * 5)))
    assert mixed.claims[0].holds is False  # half of the looks are not 95 %
    assert "is not shown" in mixed.reading
    row = mixed.tables[0][2][0]
    assert row[1] == "50.0 ± 0.0"
    assert row[4] == "40"


def chain(test, network, residual=1):
    found = {"network": network, "rbf": network, "residual": residual}
    predictions = {rule: {"tolerance": 0.05, "fits": fits, "collapse": 9} for rule, fits in found.items()}
    return {"test": test, "train": test, "predictions": predictions, "wrong_labels": 0.4}


def test_a_predicted_round_is_judged_by_what_it_loses():
    settings = rounds_predicted.Settings(rounds=4)
    test = [0.8, 0.9, 0.95, 0.94]
    lost = [rounds_predicted.lost(settings, chain(test, fits), "network") for fits in (1, 2, 3, 4, 9, None)]
    assert lost == pytest.approx([0.15, 0.05, 0, 0.01, 0.01, 0.15])
    holds = rounds_predicted.summarise(settings, dict(enumerate([chain(test, 4)] * 5)))
    assert [claim.holds for claim in holds.claims] == [True] * 4
    fails = rounds_predicted.summarise(settings, dict(enumerate([chain(test, 2, residual=2)] * 5)))
    assert [claim.holds for claim in fails.claims] == [False, False, True, False]
    assert "not shown to be within the bound" in fails.reading


def test_an_epsilon_that_nothing_or_everything_meets_predicts_nothing():
    kernel = torch.eye(6, dtype=torch.float64).numpy()
    labels = torch.randn(6, 2, dtype=torch.float64).numpy()
    assert rounds_predicted._best_fit(kernel, labels, 1.2) == {"tolerance": 1.2, "fits": None, "collapse": 0}
    kernel[3:] = 0
    assert rounds_predicted._best_fit(kernel, labels, 1e-6)["fits"] is None
    assert math.isclose(rounds_predicted._best_fit(kernel[:3, :3], labels[:3], 0.3)["tolerance"], 0.3)
