"""Weights from a file: put into the network, or refused in one line that says what is wrong."""

import re

import pytest
import torch

from sdfast.models import mlp
from sdfast.models.state import load_state


def test_the_weights_are_those_of_the_file(tmp_path):
    saved, model = mlp((8, 4, 2)), mlp((8, 4, 2))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    assert load_state(model, tmp_path / "w.pt", "--weights") is model
    for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def states():
    yield "shape", mlp((8, 5, 2)).state_dict(), "does not fit the network: 0.weight is (5, 8) and not (4, 8), 0.bias is"
    yield "more", mlp((8, 4, 2, 2)).state_dict(), "does not fit the network: the network has no 4.weight, the network"
    yield "fewer", mlp((8, 4)).state_dict(), "does not fit the network: 2.weight is missing, 2.bias is missing"
    yield "many", mlp((7, 3, 3, 3)).state_dict(), "2.bias is (3,) and not (2,), and 2 more"
    nested = {"model": mlp((8, 4, 2)).state_dict(), "epoch": 3}
    yield "nested", nested, "does not fit the network: it holds model, epoch, and the network 0.weight, 0.bias"
    yield (
        "model",
        mlp((8, 4, 2)),
        "holds objects beside tensors, wanted what torch.save(model.state_dict(), ...) writes",
    )
    weight = mlp((8, 4, 2)).state_dict()["0.weight"]
    for name, other in {
        "sparse": weight.to_sparse(),
        "without values": weight.to("meta"),
        "complex": weight.to(torch.complex64),
        "nested": torch.nested.nested_tensor([*weight], layout=torch.jagged),
    }.items():
        told = "does not fit the network: 0.weight is sparse, nested, quantised, complex or without values"
        yield name, mlp((8, 4, 2)).state_dict() | {"0.weight": other}, told
    yield "tensor", torch.zeros(3), "holds a Tensor, wanted a state_dict"
    for name, content in {"empty": b"", "text": b"no pickle", "number": b"101"}.items():
        yield name, content, "is no file of torch.save, or not the whole of one"


@pytest.mark.parametrize(("name", "content", "message"), [pytest.param(*state, id=state[0]) for state in states()])
def test_what_does_not_fit_is_named(name, content, message, tmp_path):
    path = tmp_path / f"{name}.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = mlp((8, 4, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_state(model, path, "--weights")
    told = str(caught.value)
    assert told.startswith(f"--weights: {path} ")
    assert "\n" not in told
    assert all(map(torch.equal, model.parameters(), before))


def test_a_part_of_a_file(tmp_path):
    torch.save(mlp((8, 4, 2)).state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"--weights: .*w\.pt is no file of torch.save, or not the whole of one"):
        load_state(mlp((8, 4, 2)), tmp_path / "w.pt", "--weights")


def test_damage_to_a_file_of_the_older_kind(tmp_path):
    """Whose tensors name the data behind them."""
    torch.save(mlp((8, 4, 2)).state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pt").read_bytes()
    key = re.search(rb"cpu.*?X.\x00\x00\x00(\d+)|X.\x00\x00\x00(\d{6,})", content)
    start = key.start(1) if key[1] else key.start(2)
    (tmp_path / "w.pt").write_bytes(content[:start] + b"x" + content[start + 1 :])
    with pytest.raises(ValueError, match=r"--weights: .*w\.pt is no file of torch.save, or not the whole of one"):
        load_state(mlp((8, 4, 2)), tmp_path / "w.pt", "--weights")
