"""Tiny data sets in the files of the real ones."""

import hashlib
import pickle
import struct

import numpy as np


def pictures(rng, count, channels, side):
    return rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8)


def write_cifar(folder, monkeypatch, datasets, classes=10, rows=12):
    """CIFAR's pickles of five training batches (one for 100 classes) and a test batch; torchvision gets their hashes.

    Returns (train pixels, train labels, test pixels, test labels).
    """
    rng = np.random.default_rng(classes)
    reader = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    place = folder / reader.base_folder
    place.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"

    def write(name, content):
        (place / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((place / name).read_bytes()).hexdigest()]

    def batch(name):
        pixels, labels = pictures(rng, rows, 3, 32), rng.integers(0, classes, rows)
        content = {"data": pixels.reshape(rows, -1), key: labels.tolist(), "filenames": [f"{i}.png" for i in labels]}
        return write(name, content), pixels, labels

    train = [batch(name) for name, _ in reader.train_list]
    test = [batch(name) for name, _ in reader.test_list]
    meta_name, meta_hash = write(reader.meta["filename"], {reader.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(reader, "train_list", [entry for entry, _, _ in train])
    monkeypatch.setattr(reader, "test_list", [entry for entry, _, _ in test])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "filename": meta_name, "md5": meta_hash})
    return [np.concatenate([part[i] for part in parts]) for parts in (train, test) for i in (1, 2)]


def write_fashion(folder, rows=20):
    """The four IDX files; returns (train pixels, train labels, test pixels, test labels)."""
    rng = np.random.default_rng(0)
    place = folder / "FashionMNIST" / "raw"
    place.mkdir(parents=True)
    written = []
    for prefix, count in (("train", rows), ("t10k", rows // 2)):
        pixels, labels = pictures(rng, count, 1, 28), rng.integers(0, 10, count).astype(np.uint8)
        header = struct.pack(">IIII", 0x00000803, count, 28, 28)
        (place / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">II", 0x00000801, count)
        (place / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
        written += [pixels, labels]
    return written
