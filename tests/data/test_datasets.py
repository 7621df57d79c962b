"""load_dataset: the split, and the registry."""

import pytest
import torch

from sdfast.data import DATASETS, Dataset, binary_task, dataset_names, load_dataset, register


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


def test_digits_as_pictures():
    rows, pictures = load_dataset("digits", seed=2), load_dataset("digit_pictures", seed=2)
    assert pictures.test_inputs.shape == (450, 1, 8, 8)
    assert torch.equal(pictures.test_inputs.flatten(1), rows.test_inputs)
    assert torch.equal(pictures.train_labels, rows.train_labels)


def test_a_binary_task():
    """Dong et al.: classes 2 and 7 against the rest."""
    data = load_dataset("digits")
    binary = binary_task(data, (2, 7))
    assert torch.equal(binary.train_labels, ((data.train_labels == 2) | (data.train_labels == 7)).long())
    assert torch.equal(binary.test_labels, ((data.test_labels == 2) | (data.test_labels == 7)).long())
    assert (binary.num_classes, binary.name) == (2, "digits {2, 7}")
    assert binary.train_inputs is data.train_inputs
    for positive, message in (((2, 10), "wanted classes of digits, 0 to 9"), ((), "wanted some but not all")):
        with pytest.raises(ValueError, match=message):
            binary_task(data, positive)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, f"name: got 'mnist', wanted one of {', '.join(map(repr, dataset_names()))}"),
        ("digits", {"test_fraction": 1}, "test_fraction: got 1, wanted a number in (0, 1)"),
        ("digits", {"test_fraction": 0.9999}, "test_fraction: got 0.9999, which leaves no row of 1797 for training"),
        ("digits", {"folder": "here"}, "folder: got 'here', but digits is not read from one"),
        ("digits", {"download": True}, "download: digits is nothing that torchvision can fetch"),
        ("folder", {"download": True}, "download: folder is nothing that torchvision can fetch"),
        ("folder", {}, "folder: got None, wanted the folder of your data"),
        ("cifar10", {"test_fraction": 0.5}, "test_fraction: got 0.5, but cifar10 has a test part of its own"),
        ("digits", {"seed": -1}, "seed: got -1, wanted an integer in [0, 2**32)"),
    ],
)
def test_bad_input(name, options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_dataset(name, **options)
    assert str(caught.value) == message
