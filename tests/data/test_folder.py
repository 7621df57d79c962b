"""One's own data: NumPy archives and folders of pictures."""

import numpy as np
import pytest
import torch

from sdfast.data import load_dataset, load_folder


def write(path, rows=10, shape=(4,), dtype=np.float64, labels=None):
    rng = np.random.default_rng(rows)
    inputs = (255 * rng.random((rows, *shape))).astype(dtype)
    labels = np.arange(rows) % 3 if labels is None else labels
    np.savez(path, inputs=inputs, labels=labels)
    return inputs, labels


def test_one_archive_is_split_once(tmp_path):
    inputs, labels = write(tmp_path / "mine.npz", 21)
    data = load_dataset("folder", folder=tmp_path, test_fraction=1 / 3, seed=5)
    assert (len(data.train_labels), len(data.test_labels), data.num_classes) == (14, 7, 3)
    assert data.name == tmp_path.name
    rows = {tuple(row): label for row, label in zip(inputs.astype(np.float32).tolist(), labels, strict=True)}
    seen = torch.cat([data.train_inputs, data.test_inputs]).tolist()
    assert {tuple(row) for row in seen} == set(rows)
    assert [rows[tuple(row)] for row in seen] == torch.cat([data.train_labels, data.test_labels]).tolist()
    again, other = (load_folder(tmp_path, test_fraction=1 / 3, seed=seed) for seed in (5, 6))
    assert torch.equal(again.train_inputs, data.train_inputs)
    assert not torch.equal(other.train_inputs, data.train_inputs)


def test_two_archives_are_the_parts(tmp_path):
    train, _ = write(tmp_path / "train.npz", 10, (1, 5, 5), np.uint8)
    _, labels = write(tmp_path / "test.npz", 4, (1, 5, 5), np.uint8)
    data = load_folder(tmp_path)
    assert data.train_inputs.dtype == torch.uint8  # pictures stay what they are
    np.testing.assert_array_equal(data.train_inputs.numpy(), train)
    assert data.test_labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"test_fraction: got 0\.5, but .* has a test part of its own"):
        load_folder(tmp_path, test_fraction=0.5)


def test_folders_of_pictures(tmp_path, torchvision_datasets):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    data = load_folder(tmp_path)
    assert data.train_inputs.shape == (6, 3, 6, 5)
    assert data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    last = np.array(Image.open(tmp_path / "test" / "dog" / "2.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(data.test_inputs[5].numpy(), last)
    split = load_folder(tmp_path / "train", test_fraction=0.5)
    assert (len(split.train_labels), len(split.test_labels), split.num_classes) == (3, 3, 2)
    Image.fromarray(pixels[:4]).save(tmp_path / "train" / "dog" / "9.png")
    with pytest.raises(ValueError, match=r"9\.png has \(4, 5, 3\) pixels, the first \(6, 5, 3\); make all of one size"):
        load_folder(tmp_path)


def test_bad_folders(tmp_path):
    def message(folder=tmp_path, **options):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_folder(folder, **options)
        return str(caught.value)

    assert "there is no folder" in message(tmp_path / "nowhere")
    assert "holds no .npz file and no folders of pictures" in message()
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 2)), labels=np.arange(3))
    assert "a.npz: has no array inputs, only labels, x" in message()
    write(tmp_path / "a.npz", labels=np.arange(10) / 2)
    assert "got labels of float64, wanted integers from 0 on" in message()
    write(tmp_path / "a.npz", labels=np.arange(10) - 1)
    assert "wanted integers from 0 on" in message()
    write(tmp_path / "a.npz", labels=np.arange(9))
    assert "got inputs (10, 4) and labels (9,)" in message()
    write(tmp_path / "a.npz", labels=np.zeros(10, dtype=int))
    assert "has one class" in message()
    write(tmp_path / "a.npz")
    assert "test_fraction: got 0.99, which leaves no row" in message(test_fraction=0.99)
    write(tmp_path / "b.npz")
    assert "holds a.npz, b.npz, wanted train.npz and test.npz, or one archive" in message()
    write(tmp_path / "train.npz")
    write(tmp_path / "test.npz", shape=(5,))
    assert "training and test inputs differ" in message()
    (tmp_path / "train.npz").write_bytes(b"nonsense")
    assert "train.npz" in message()
