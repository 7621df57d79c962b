"""flip_labels: what may become of a label, how often, and that it is a function of the generator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfast.data import flip_labels

CIRCLE = torch.eye(5).roll(1, dims=1)  # c -> c + 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@st.composite
def flips(draw):
    classes = draw(st.integers(2, 12))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]))
    shape = draw(st.sampled_from([(0,), (1,), (7,), (100,), (20, 5)]))
    labels = torch.randint(classes, shape, generator=seeded(draw(st.integers(0, 99))), dtype=dtype)
    kind = draw(st.sampled_from(["symmetric", "asymmetric", "pair"]))
    options = {"exact": draw(st.booleans())}
    if kind == "symmetric":
        options["convention"] = draw(st.sampled_from(["all", "others"]))
    if kind == "asymmetric":
        weights = torch.rand(classes, classes, generator=seeded(draw(st.integers(0, 99))), dtype=torch.float64)
        weights[weights < 0.4] = 0
        weights += torch.eye(classes) * 0.1
        options["transition"] = weights / weights.sum(1, keepdim=True)
    return labels, draw(st.floats(0, 1)), classes, kind, options, draw(st.integers(0, 2**32))


@settings(max_examples=150, deadline=None)
@given(flips())
def test_every_kind_keeps_its_promises(case):
    labels, rate, classes, kind, options, seed = case
    before = labels.clone()
    noisy, flipped, realised = flip_labels(labels, rate, classes, kind, generator=seeded(seed), **options)
    again = flip_labels(labels, rate, classes, kind, generator=seeded(seed), **options)

    assert torch.equal(labels, before)
    assert noisy.shape == labels.shape
    assert noisy.dtype == labels.dtype
    assert torch.equal(noisy, again.labels)
    assert torch.equal(flipped, noisy != labels)
    assert realised == (float(flipped.double().mean()) if labels.numel() else 0.0)
    if labels.numel():
        assert 0 <= int(noisy.min()) <= int(noisy.max()) < classes
    if rate == 0:
        assert not flipped.any()
    moved_from, moved_to = labels[flipped].long(), noisy[flipped].long()
    if kind == "pair":
        assert torch.equal(moved_to, (moved_from + 1) % classes)
    if kind == "asymmetric":
        assert (options["transition"][moved_from, moved_to] > 0).all()
    always_moves = kind == "pair" or options.get("convention") == "others"
    if always_moves and options["exact"]:
        assert int(flipped.sum()) == round(rate * labels.numel())
    if always_moves and rate == 1:
        assert flipped.all()


@pytest.mark.parametrize(("convention", "expected"), [("all", 0.4 * 9 / 10), ("others", 0.4)])
def test_the_conventions_differ_in_the_realised_rate_by_the_share_of_lucky_draws(convention, expected):
    labels = torch.arange(200_000) % 10
    noise = flip_labels(labels, 0.4, 10, convention=convention, generator=seeded())
    assert abs(noise.realised_rate - expected) < 0.005  # more than four standard deviations
    for label in range(10):  # uniform over the other classes, from each class
        counts = torch.bincount(noise.labels[(labels == label) & noise.flipped], minlength=10).double()
        others = counts[torch.arange(10) != label]
        assert counts[label] == 0
        assert (others / others.sum() - 1 / 9).abs().max() < 0.02


def test_asymmetric_noise_has_the_frequencies_of_its_matrix():
    transition = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    labels = torch.arange(90_000) % 3
    noisy = flip_labels(labels, 1.0, 3, "asymmetric", transition=transition, generator=seeded()).labels
    for label in range(3):
        frequencies = torch.bincount(noisy[labels == label], minlength=3) / 30_000
        assert (frequencies - transition[label]).abs().max() < 0.015
        assert (frequencies[transition[label] == 0] == 0).all()


def test_without_a_generator_the_global_one_is_used():
    labels = torch.zeros(50, dtype=torch.int64)
    torch.manual_seed(3)
    first = flip_labels(labels, 0.5, 4).labels
    torch.manual_seed(3)
    assert torch.equal(first, flip_labels(labels, 0.5, 4).labels)
    assert not torch.equal(first, flip_labels(labels, 0.5, 4).labels)


GOOD = {"labels": torch.arange(5), "rate": 0.3, "num_classes": 5}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": [0, 1]}, TypeError, "labels: got list, wanted a torch.Tensor"),
        ({"labels": torch.rand(5)}, TypeError, "labels: got float32, wanted integer class indices"),
        ({"labels": torch.tensor([0, 5])}, ValueError, "labels: got 0 to 5, wanted 0 <= label < 5"),
        ({"labels": torch.tensor([-1, 2])}, ValueError, "labels: got -1 to 2, wanted 0 <= label < 5"),
        ({"rate": 1.5}, ValueError, "rate: got 1.5, wanted within [0, 1]"),
        ({"rate": float("nan")}, ValueError, "rate: got nan, wanted within [0, 1]"),
        ({"rate": "0.4"}, TypeError, "rate: got str, wanted a number in [0, 1]"),
        ({"num_classes": 1}, ValueError, "num_classes: got 1, wanted at least 2"),
        ({"num_classes": 10.0}, TypeError, "num_classes: got float, wanted an integer"),
        (
            {"labels": torch.arange(5, dtype=torch.uint8), "num_classes": 300},
            ValueError,
            "num_classes: got 300, more than uint8 labels can name",
        ),
        ({"kind": "flip"}, ValueError, "kind: got 'flip', wanted one of 'symmetric', 'asymmetric', 'pair'"),
        ({"convention": "some"}, ValueError, "convention: got 'some', wanted one of 'all', 'others'"),
        (
            {"kind": "pair", "convention": "others"},
            ValueError,
            "convention: got 'others', but only kind='symmetric' has one, not 'pair'",
        ),
        (
            {"transition": CIRCLE},
            ValueError,
            "transition: got Tensor with kind='symmetric', only kind='asymmetric' takes",
        ),
        (
            {"kind": "asymmetric"},
            ValueError,
            "transition: got None with kind='asymmetric', wanted a (classes, classes)",
        ),
        (
            {"kind": "asymmetric", "transition": torch.eye(4)},
            ValueError,
            "transition: got shape (4, 4), wanted (5, 5) for num_classes=5",
        ),
        (
            {"kind": "asymmetric", "transition": 2 * CIRCLE},
            ValueError,
            "transition: row 0 sums to 2 with smallest entry 0, wanted non-negative entries that sum to 1",
        ),
        ({"generator": 3}, TypeError, "generator: got int, wanted a torch.Generator"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error) as caught:
        flip_labels(**{**GOOD, **changes})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "pair"])
@pytest.mark.parametrize("exact", [False, True])
def test_ignored_labels_stay_and_count_for_nothing(kind, exact):
    labels = torch.arange(40_000).reshape(2, -1) % 5
    holes = labels.clone()
    holes[:, ::2] = -100
    options = {"convention": "others"} if kind == "symmetric" else {}
    options |= {"transition": CIRCLE} if kind == "asymmetric" else {}
    noise = flip_labels(holes, 0.3, 5, kind, exact=exact, ignore_index=-100, generator=seeded(), **options)
    assert (noise.labels[:, ::2] == -100).all()
    assert not noise.flipped[:, ::2].any()
    assert noise.realised_rate == pytest.approx(0.3, abs=0 if exact else 0.02)
    assert int(noise.flipped.sum()) == noise.realised_rate * 20_000
    wanted = flip_labels(labels[:, 1::2], 0.3, 5, kind, exact=exact, generator=seeded(), **options)
    assert torch.equal(noise.labels[:, 1::2], wanted.labels)


def test_labels_that_are_no_class_are_refused_with_the_way_out():
    holes = torch.tensor([0, -100, 3])
    with pytest.raises(ValueError, match=r"labels: got -100 to 3, wanted 0 <= label < 4; ignore_index= keeps one"):
        flip_labels(holes, 0.3, 4)
    with pytest.raises(ValueError, match=r"labels: got 0 to 3, wanted 0 <= label < 3$"):
        flip_labels(holes, 0.3, 3, ignore_index=-100)
    with pytest.raises(TypeError, match=r"ignore_index: got float, wanted an integer or None"):
        flip_labels(holes, 0.3, 4, ignore_index=-100.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rounded_transition_is_taken(dtype):
    weights = torch.rand(20, 7, 7, generator=seeded(), dtype=torch.float64)
    for matrix in weights / weights.sum(-1, keepdim=True):
        flip_labels(torch.arange(7), 0.5, 7, "asymmetric", transition=matrix.to(dtype))
    with pytest.raises(ValueError, match="transition: row 0 sums to 1"):
        flip_labels(torch.arange(7), 0.5, 7, "asymmetric", transition=(1.05 * matrix).to(dtype))


def test_labels_without_values_are_refused():
    with pytest.raises(ValueError, match="labels: are on the meta device, which holds no values"):
        flip_labels(torch.zeros(3, dtype=torch.int64, device="meta"), 0.5, 4)
