"""Batches: every row once, an order that depends on seed and epoch alone."""

import pytest
import torch

from sdfast.data import Batches


def rows_of(batches):
    return [int(row) for *_, rows in batches for row in rows]


def some(count=10, batch_size=3, **options):
    inputs = torch.arange(count * 2.0).reshape(count, 2)
    return Batches(inputs, torch.arange(count), batch_size, **options)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (10, 3), (9, 3), (3, 10)])
def test_every_row_comes_once_beside_its_label(count, batch_size, shuffle):
    batches = some(count, batch_size, shuffle=shuffle, with_indices=True)
    seen = list(batches)
    assert len(seen) == len(batches) == -(-count // batch_size)
    for inputs, labels, rows in seen:
        assert torch.equal(labels, rows)
        assert torch.equal(inputs[:, 0], 2.0 * rows)
    assert sorted(row for *_, rows in seen for row in rows.tolist()) == list(range(count))
    if not shuffle:
        assert torch.equal(torch.cat([rows for *_, rows in seen]), torch.arange(count))


def test_drop_last_leaves_the_smaller_batch_out():
    batches = some(10, 3, drop_last=True)
    assert [len(labels) for _, labels in batches] == [3, 3, 3]
    assert len(batches) == 3


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = some(100, 7, seed=5, with_indices=True)
    first, second = rows_of(batches), rows_of(batches)
    assert first != second
    torch.rand(17)  # what else draws numbers changes nothing
    batches.set_epoch(0)
    assert rows_of(batches) == first
    other = some(100, 7, seed=5, with_indices=True)
    other.set_epoch(1)
    assert rows_of(other) == second
    assert rows_of(some(100, 7, seed=6, with_indices=True)) != first


def test_shuffling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(some())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_changes_with_any_value():
    plain = some()
    assert plain.fingerprint() == some(seed=9).fingerprint()
    changed = some()
    changed.labels = changed.labels.clone()
    changed.labels[4] = 7
    assert changed.fingerprint() != plain.fingerprint()


X, Y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1], Y, 2), {}, TypeError, "inputs: got list, wanted a torch.Tensor"),
        ((X, [1], 2), {}, TypeError, "labels: got list, wanted a torch.Tensor"),
        ((X, Y[:3], 2), {}, ValueError, "labels: got inputs (4, 2) and labels (3,), wanted as many rows in both"),
        ((X, Y, 0), {}, ValueError, "batch_size: got 0, wanted an integer >= 1"),
        ((X, Y, 2.0), {}, ValueError, "batch_size: got 2.0, wanted an integer >= 1"),
        ((X, Y, 5), {"drop_last": True}, ValueError, "inputs: 4 rows make no batch of 5 (drop_last=True)"),
        ((X[:0], Y[:0], 5), {}, ValueError, "inputs: 0 rows make no batch of 5 (drop_last=False)"),
        ((X, Y, 2), {"seed": -1}, ValueError, "seed: got -1, wanted an integer >= 0"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error) as caught:
        Batches(*arguments, **options)
    assert str(caught.value) == message


def test_a_bad_epoch():
    with pytest.raises(ValueError, match="epoch: got -1, wanted an integer >= 0"):
        some().set_epoch(-1)


@pytest.mark.parametrize("device", ["foo", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device: got '{device}', which torch cannot compute on here"):
        Batches(torch.zeros(3, 2), torch.zeros(3), 2, device=device)
