"""Short hashes by which a checkpoint knows its data again."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

LOOKED_AT = 32  # rows of a data set that only its own code can read


def content_hash(value: object) -> str:
    """A hash of tensors, arrays, numbers, strings and what lists and mappings hold of them; of all else the type."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def data_hash(train: Iterable) -> str | None:
    """A hash of what an iterable of batches will yield, or ``None`` where its data cannot be looked at.

    A ``fingerprint()`` of its own decides. Otherwise whole: a list or tuple of batches, and a DataLoader's
    TensorDataset, also inside Subset and ConcatDataset. Of another data set with a length: that, its ``targets``,
    ``labels`` and ``indices`` if it has them, and `LOOKED_AT` rows spread over it, unless two looks at them differ.
    """
    own = getattr(train, "fingerprint", None)
    if callable(own):
        return str(own())
    if type(train) in (list, tuple):  # a class of one's own may count its passes
        return content_hash(train)
    dataset = getattr(train, "dataset", None)
    if not isinstance(train, DataLoader) or not isinstance(dataset, Sized):
        return None
    whole = _whole(dataset)
    if whole is not None:
        return content_hash(whole)
    named = [getattr(dataset, name, None) for name in ("targets", "labels", "indices")]
    looks = [_look(train, len(dataset)) for _ in range(2)]
    return content_hash([type(dataset).__qualname__, len(dataset), named, looks[0] if looks[0] == looks[1] else None])


@contextmanager
def fixed_random() -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generator from a fixed seed, and afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # and no GPU's, as torch.manual_seed would
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def spread(length: int, count: int) -> list[int]:
    """At most `count` numbers from 0 to ``length - 1``, both included, evenly spread."""
    return sorted({index * (length - 1) // max(count - 1, 1) for index in range(count)}) if length else []


def _whole(dataset: object) -> list | None:
    if type(dataset) is TensorDataset:
        return list(dataset.tensors)
    if type(dataset) is Subset:
        inner = _whole(dataset.dataset)
        return None if inner is None else [list(dataset.indices), inner]
    if type(dataset) is ConcatDataset:
        parts = [_whole(part) for part in dataset.datasets]
        return None if None in parts else parts
    return None


def _look(train: DataLoader, rows: int) -> list[str] | None:
    """Hashes of some rows, read where training will read them: what a data set opens must not reach its workers."""
    with_worker = train.num_workers > 0
    dataset: Dataset[Any] = train.dataset
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=spread(rows, LOOKED_AT),
        collate_fn=content_hash,
        num_workers=int(with_worker),
        worker_init_fn=train.worker_init_fn,
        multiprocessing_context=train.multiprocessing_context if with_worker else None,
        generator=torch.Generator().manual_seed(0),
    )
    with fixed_random():
        try:
            return list(loader)
        except (LookupError, TypeError):  # its rows are not addressed by numbers
            return None


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif hasattr(value, "__array_interface__"):  # NumPy's own, and pictures
        array = np.asarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        digest.update(repr(value).encode() + b";")
    elif isinstance(value, Mapping):
        _feed(digest, [part for item in value.items() for part in item])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(type(value).__qualname__.encode())
