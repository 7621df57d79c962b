"""ImageBatches against the crop, mirror and shift written out picture by picture."""

import pytest
import torch

from sdfast.data import Batches, ImageBatches, evaluation_batches, load_dataset, training_batches
from sdfast.data.images import picture_mean
from sdfast.data.parts import Dataset


def pixels(count=9, channels=3, height=8, width=6):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def by_hand(batches, rows, epoch):
    """The definition: pad, crop at the drawn corner, mirror, divide, subtract, in float64."""
    offsets, mirrored = batches._draws(epoch)
    p, (height, width) = batches.padding, batches.inputs.shape[2:]
    out = []
    for row in rows.tolist():
        padded = torch.zeros(batches.inputs.shape[1], height + 2 * p, width + 2 * p, dtype=torch.float64)
        padded[:, p : p + height, p : p + width] = batches.inputs[row]
        top, left = offsets[:, row].tolist()
        picture = padded[:, top : top + height, left : left + width]
        if mirrored[row]:
            picture = torch.stack([picture[:, :, width - 1 - column] for column in range(width)], 2)
        out.append((picture / 255 - batches.mean[:, None, None]) / batches.std[:, None, None])
    return torch.stack(out)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
def test_a_batch_is_what_the_definition_gives(padding, flip):
    inputs = pixels()
    labels = torch.arange(9)
    batches = ImageBatches(
        inputs, labels, 4, padding=padding, flip=flip, std=[0.3, 0.5, 0.2], seed=3, with_indices=True
    )
    assert torch.equal(batches.inputs, inputs)
    for epoch in range(2):
        seen = []
        for got, got_labels, rows in batches:
            assert torch.equal(got_labels, rows)
            seen += rows.tolist()
            if padding or flip:
                wanted = by_hand(batches, rows, epoch)
            else:
                wanted = (inputs[rows] / 255 - batches.mean[:, None, None]) / batches.std[:, None, None]
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=3e-6)
        assert sorted(seen) == list(range(9))


def test_every_shift_and_both_mirrors_are_drawn_evenly():
    batches = ImageBatches(pixels(4000, 1, 4, 4), torch.zeros(4000), 64, padding=1, seed=1)
    offsets, mirrored = batches._draws(0)
    counts = torch.bincount(offsets[0] * 3 + offsets[1], minlength=9)
    assert int((counts - 4000 / 9).abs().max()) < 5 * (4000 * 8 / 81) ** 0.5
    assert abs(int(mirrored.sum()) - 2000) < 5 * 1000**0.5


def test_draws_depend_on_seed_epoch_and_row_alone():
    inputs, labels = pixels(20), torch.arange(20)

    def epoch(number, seed=0, batch_size=4):
        batches = ImageBatches(inputs, labels, batch_size, padding=2, seed=seed, with_indices=True)
        batches.set_epoch(number)
        pictures, _, rows = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return pictures[rows.argsort()]

    assert torch.equal(epoch(3), epoch(3, batch_size=7))  # also what a resumed run sees
    assert not torch.equal(epoch(3), epoch(4))
    assert not torch.equal(epoch(3), epoch(3, seed=1))
    state = torch.get_rng_state()
    epoch(1)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up


def test_the_mean_is_each_channels():
    inputs = pixels(5)
    wanted = inputs.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(picture_mean(inputs), wanted, rtol=1e-14, atol=0)
    whole = torch.cat([x for x, _ in ImageBatches(inputs, torch.arange(5), 2, padding=0, flip=False)])
    assert float(whole.mean((0, 2, 3)).abs().max()) < 1e-6


def test_a_fingerprint_knows_the_augmentation():
    inputs, labels = pixels(), torch.arange(9)
    options = [{}, {"padding": 1}, {"flip": False}, {"mean": [0, 0, 0]}, {"std": [1, 1, 2]}]
    prints = [ImageBatches(inputs, labels, 4, **{"padding": 2, **option}).fingerprint() for option in options]
    assert len(set(prints)) == len(prints)
    assert ImageBatches(inputs, labels, 4, padding=2).fingerprint() == prints[0]


def test_parts_of_a_data_set():
    data = Dataset(pixels(9), torch.arange(9) % 3, pixels(5), torch.arange(5) % 3, 3, "tiny")
    train = training_batches(data, data.train_labels, 4)
    assert (train.padding, train.flip, train.with_indices) == (4, True, True)
    plain = training_batches(data, data.train_labels, 4, augment=False)
    assert (plain.padding, plain.flip) == (0, False)
    test = evaluation_batches(data)
    assert torch.equal(test.mean, train.mean)  # the training part's, not its own
    assert torch.equal(next(iter(test))[1], data.test_labels)
    assert torch.equal(next(iter(evaluation_batches(data, "train")))[1], data.train_labels)
    digits = load_dataset("digits")
    assert type(training_batches(digits, digits.train_labels, 64)) is Batches
    assert type(evaluation_batches(digits)) is Batches


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": torch.rand(9, 3, 8, 6)}, TypeError, "inputs: got torch.float32 of (9, 3, 8, 6), wanted uint8"),
        ({"inputs": pixels()[0]}, TypeError, "wanted uint8 (N, channels, height, width)"),
        ({"labels": torch.arange(8)}, ValueError, "wanted as many rows in both"),
        ({"padding": 6}, ValueError, "padding: got 6, wanted an integer from 0 to 5"),
        ({"padding": 1.0}, ValueError, "padding: got 1.0"),
        ({"mean": [0.5]}, ValueError, "mean: got [0.5], wanted a finite number for each of 3 channels"),
        ({"mean": [0.5, float("nan"), 0.1]}, ValueError, "mean: got"),
        ({"std": [1, 0, 1]}, ValueError, "wanted positive numbers"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error) as caught:
        ImageBatches(**{"inputs": pixels(), "labels": torch.arange(9), "batch_size": 4, **change})
    assert message in str(caught.value)
