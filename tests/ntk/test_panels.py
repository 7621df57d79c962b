"""Memory of gradients that is used again: never two owners at once, and nothing rests on what it holds."""

import mmap

import pytest
import torch

from sdfast.models.cifar_resnet import CifarResNet
from sdfast.ntk import gram, operator, panels

from .oracle import assert_exact, gram_of, jacobian

needs_it = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="the system has no memory of the kind")
SIZE = 2**24


@pytest.fixture(autouse=True)
def nothing_idle():
    panels._idle.clear()
    yield
    panels._idle.clear()


def filled(memory, value):
    torch.frombuffer(memory, dtype=torch.float32).fill_(value)


@needs_it
def test_memory_in_which_a_tensor_lies_is_not_lent_again():
    lent = [panels.take(SIZE)]
    view = torch.frombuffer(lent[0], dtype=torch.float32).view(2, -1)[1, 3:7]
    panels.give_back(lent)
    assert not panels._idle
    assert not lent
    view.fill_(3.0)  # is still there
    filled(panels.take(SIZE), 4.0)
    assert (view == 3).all()


@needs_it
def test_memory_is_lent_again_where_it_fits():
    memory = panels.take(SIZE)
    known = id(memory)
    lent = [memory]
    del memory
    panels.give_back(lent)
    assert [id(idle) for idle in panels._idle] == [known]
    assert id(panels.take(SIZE - 5000)) == known
    assert not panels._idle  # one owner at a time


@needs_it
@pytest.mark.parametrize("size", [2 * SIZE, SIZE // 2 - 1])
def test_what_does_not_fit_is_not_held_beside_the_new(size):
    panels.give_back([panels.take(SIZE)])
    memory = panels.take(size)
    assert len(memory) == size
    assert not panels._idle


@needs_it
def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(panels, "_MOST", 2 * SIZE)
    lent = [panels.take(SIZE) for _ in range(3)]
    panels.give_back(lent)
    assert len(panels._idle) == 2
    panels.give_back([panels.take(3 * SIZE)])
    assert sum(map(len, panels._idle)) <= 2 * SIZE


def test_little_memory_is_torchs():
    assert panels.take(1000) is None


@needs_it
def test_nothing_rests_on_what_the_memory_holds():
    model, x = CifarResNet(8).eval(), torch.randn(40, 3, 16, 16)
    first = gram(model, x, outputs="sum")
    assert len(panels._idle) == 1
    for _ in range(2):
        filled(panels._idle[0], torch.nan)
        assert torch.equal(first, gram(model, x, outputs="sum"))
    assert len(panels._idle) == 1


@needs_it
def test_groups_take_turns_in_one_piece_of_memory():
    model, x = CifarResNet(8).eval(), torch.randn(40, 3, 16, 16)
    first = gram(model, x, outputs="sum")
    panels._idle.clear()
    parted = gram(model, x, outputs="sum", memory=2**23)
    assert sum(map(len, panels._idle)) <= 2**23
    torch.testing.assert_close(parted, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


def test_an_operator_keeps_its_own():
    model, x = CifarResNet(8, num_classes=1).eval().double(), torch.randn(12, 3, 16, 16).double()
    wanted = gram_of(jacobian(model, x), "sum")
    kept = operator(model, x, outputs="sum", batch_size=7)
    for _ in range(3):
        gram(model, torch.randn_like(x), outputs="sum")
        assert_exact(kept.to_dense(), wanted)
