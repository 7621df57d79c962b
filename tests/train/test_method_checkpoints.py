"""A training by any method that is cut off between two epochs ends in the bits of one that is not."""

import pytest
import torch
from torch import nn

from sdfast.baselines import METHODS, TwoNetworks, make_method
from sdfast.data import Batches
from sdfast.train import SelfDistiller

ROWS, CLASSES, EPOCHS = 48, 3, 4


def network():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def fit(name, data, path=None, callbacks=(), seed=0):
    inputs, labels = data
    torch.manual_seed(seed)
    model = TwoNetworks(network(), network()) if name == "co-teaching" else network()
    options = {"co-teaching": {"forget_rate": 0.3}, "d2l": {"neighbours": 3, "window": 2}}.get(name, {})
    method = make_method(name, labels, CLASSES, **options)
    if hasattr(method, "warm_up"):
        method.warm_up = 2
    distiller = SelfDistiller(model, torch.optim.SGD(model.parameters(), lr=0.3), method=method)
    batches = Batches(inputs, labels, 8, with_indices=method.needs_indices)
    distiller.fit(batches, EPOCHS, checkpoint=path, progress=False, callbacks=callbacks)
    return model.state_dict()


@pytest.mark.parametrize("done", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_cut_off_and_continued_it_ends_in_the_same_bits(name, done, tmp_path):
    data = torch.randn(ROWS, 3), torch.randint(CLASSES, (ROWS,))

    def interrupt(distiller, history):
        if len(history) == done:
            raise KeyboardInterrupt

    whole = fit(name, data)
    with pytest.raises(KeyboardInterrupt):
        fit(name, data, tmp_path / "run.pt", [interrupt])
    continued = fit(name, data, tmp_path / "run.pt", seed=9)  # a new process draws other first weights
    for key, value in whole.items():
        assert torch.equal(value, continued[key]), key
