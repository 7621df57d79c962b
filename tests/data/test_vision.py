"""CIFAR and Fashion-MNIST from tiny files in the real formats, by the real path; and what is said where that fails."""

import subprocess
import sys
import textwrap
import urllib.error

import numpy as np
import pytest
import torch
from disk_formats import write_cifar, write_fashion

from sdfast.data import load_dataset


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(name, classes, tmp_path, monkeypatch, torchvision_datasets):
    written = write_cifar(tmp_path, monkeypatch, torchvision_datasets, classes)
    data = load_dataset(name, folder=tmp_path)
    assert (data.num_classes, data.name) == (classes, name)
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.uint8
    for got, wanted in zip(data[:4], written, strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train_inputs.is_contiguous()


def test_fashion_mnist(tmp_path, torchvision_datasets):
    written = write_fashion(tmp_path)
    data = load_dataset("fashion_mnist", folder=tmp_path)
    assert data.train_inputs.shape == (20, 1, 28, 28)
    for got, wanted in zip(data[:4], written, strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)


def test_a_missing_folder_is_named(tmp_path, torchvision_datasets):
    with pytest.raises(ValueError, match=r"there is no cifar10 in .*looked for .*cifar-10-batches-py.*download=True"):
        load_dataset("cifar10", folder=tmp_path / "nowhere")


def test_damaged_files_are_told(tmp_path, monkeypatch, torchvision_datasets):
    write_cifar(tmp_path / "cifar", monkeypatch, torchvision_datasets)
    batch = tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged: Dataset not found"):
        load_dataset("cifar10", folder=tmp_path / "cifar")
    write_fashion(tmp_path / "fashion")
    labels = tmp_path / "fashion" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:10])
    with pytest.raises(ValueError, match="raw is incomplete or damaged"):
        load_dataset("fashion_mnist", folder=tmp_path / "fashion")


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_without_a_network_the_folder_is_named(name, tmp_path, monkeypatch, torchvision_datasets):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", offline)
    with pytest.raises(OSError, match=f"could not fetch {name} into .*new.*put its files into .*new.* by hand"):
        load_dataset(name, folder=tmp_path / "new", download=True)


def test_files_that_are_there_are_not_fetched_again(tmp_path, torchvision_datasets):
    write_fashion(tmp_path)
    assert len(load_dataset("fashion_mnist", folder=tmp_path, download=True).test_labels) == 10


def fresh_process(tmp_path, script):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    """Its import stops as the real one's does beside a CPU-only torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    script = """
        import sys
        sys.path.insert(0, ".")
        from sdfast.cli import main
        raise SystemExit(main(["train", "--dataset", "cifar10", "--data", ".", "--output", "run"]))
    """
    code, said = fresh_process(tmp_path, script)
    assert code == 1
    assert said.count("\n") == 1
    assert "torchvision is installed but does not load beside torch" in said
    assert "operator torchvision::nms does not exist" in said


def test_a_missing_torchvision_names_the_extra(tmp_path):
    script = """
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
        from sdfast.cli import main
        raise SystemExit(main(["train", "--dataset", "cifar100", "--data", ".", "--output", "run"]))
    """
    code, said = fresh_process(tmp_path, script)
    assert code == 1
    assert said == 'sdfast train: error: torchvision is not installed: pip install "sdfast[vision]"\n'
