"""``sdfast train`` on pictures, one's own data and one's own network."""

import json

import numpy as np
import pytest
import torch
from disk_formats import write_cifar

from sdfast.cli import main
from sdfast.train import History


def train(*words):
    return main(["train", "--epochs", "2", "--batch-size", "8", "--no-progress", *map(str, words)])


def write_pictures(folder, rows=24):
    """Two classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 2
    inputs = (rng.integers(0, 100, (rows, 1, 8, 8)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    folder.mkdir()
    np.savez(folder / "pictures.npz", inputs=inputs, labels=labels)


def weights(folder):
    return torch.load(folder / "model.pt")


def test_own_pictures_and_a_resumed_run(tmp_path, capsys):
    """Order and augmentation go on where they were: the resumed run ends with the weights of one without a break."""
    write_pictures(tmp_path / "mine")
    words = ("--dataset", "folder", "--data", tmp_path / "mine", "--model", "small_cnn", "--schedule", "constant")
    assert train(*words, "--epochs", 2, "--output", tmp_path / "a") == 0
    assert train("--resume", "--epochs", 4, "--output", tmp_path / "a") == 0  # data and model from the settings
    assert train(*words, "--epochs", 4, "--output", tmp_path / "b") == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)
    history = History.from_json(tmp_path / "b" / "history.json")
    assert history.last.accuracy > 0.8
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["model"] == "small_cnn"
    assert train(*words, "--epochs", 4, "--no-augment", "--output", tmp_path / "c") == 0
    third = weights(tmp_path / "c")
    assert not all(torch.equal(first[name], third[name]) for name in first)
    capsys.readouterr()
    assert train("--resume", "--epochs", 4, "--no-augment", "--output", tmp_path / "a") == 2
    assert "--no-augment was False and is True" in capsys.readouterr().err


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "networks.py").write_text(
        "from torch import nn\ndef linear(input_shape, num_classes): return nn.Linear(*input_shape, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train("--model", "networks:linear", "--output", tmp_path / "run", "--noise", 0.2) == 0
    assert weights(tmp_path / "run")["weight"].shape == (10, 64)


def test_cifar_through_the_real_path(tmp_path, monkeypatch, torchvision_datasets, capsys):
    write_cifar(tmp_path / "files", monkeypatch, torchvision_datasets)
    words = ("--dataset", "cifar10", "--data", tmp_path / "files", "--model", "resnet20", "--noise", 0.4)
    assert train(*words, "--epochs", 1, "--batch-size", 60, "--output", tmp_path / "run") == 0
    assert len(History.from_json(tmp_path / "run" / "history.json")) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "resnet21"), "--model: got 'resnet21', wanted module:function or one of"),
        (("--model", "resnet20"), "--model: resnet20 got inputs (64,), wanted (channels, height, width)"),
        (("--model", "small_cnn", "--hidden", 5), "--hidden: are widths of --model mlp, not of small_cnn"),
        (("--data", "here"), "--data: got 'here', but digits is not read from one"),
        (("--download",), "--download: digits is nothing that torchvision can fetch"),
        (("--dataset", "folder"), "--data: got None, wanted the folder of your data"),
        (("--dataset", "folder", "--data", "nowhere"), "--data: there is no folder nowhere"),
        (("--no-augment",), "--no-augment: digits holds no uint8 pictures"),
    ],
)
def test_bad_flags(words, said, tmp_path, capsys):
    assert train(*words, "--output", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
