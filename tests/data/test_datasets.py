"""load_dataset: the split, and the registry."""

import pytest
import torch

from sdfast.data import DATASETS, Dataset, load_dataset, register


def test_digits_are_split_once_and_scaled():
    data = load_dataset("digits", seed=1)
    assert data.train_inputs.shape == (1347, 64)
    assert data.test_inputs.shape == (450, 64)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert (float(data.train_inputs.min()), float(data.train_inputs.max())) == (0.0, 1.0)
    assert data.train_labels.unique().tolist() == list(range(data.num_classes))
    rows = {tuple(row) for row in torch.cat([data.train_inputs, data.test_inputs]).tolist()}
    assert len(rows) == 1797  # each image once


def test_the_split_is_a_function_of_the_seed():
    first, again, other = load_dataset("digits"), load_dataset("digits"), load_dataset("digits", seed=1)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_inputs, other.train_inputs)


def test_a_registered_data_set_is_found(monkeypatch):
    monkeypatch.setattr("sdfast.data.datasets.DATASETS", dict(DATASETS))

    @register("two points")
    def load(test_fraction, seed):
        ends = torch.tensor([[0.0], [1.0]])
        return Dataset(ends, torch.tensor([0, 1]), ends, torch.tensor([0, 1]), 2, f"{test_fraction} {seed}")

    assert load_dataset("two points", test_fraction=0.5, seed=3).name == "0.5 3"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "name: got 'mnist', wanted one of 'digits'"),
        ("digits", {"test_fraction": 1}, "test_fraction: got 1, wanted a number in (0, 1)"),
        ("digits", {"test_fraction": 0.9999}, "test_fraction: got 0.9999, which leaves no row of 1797 for training"),
        ("digits", {"seed": -1}, "seed: got -1, wanted an integer in [0, 2**32)"),
    ],
)
def test_bad_input(name, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_dataset(name, **options)
    assert str(caught.value) == message
