"""``sdfast rounds --predict``: the numbers of kernel and theory by hand, and one line for what is wrong."""

import json

import numpy as np
import pytest
import torch

from sdfast import cli, hilbert, ntk
from sdfast.data import flip_labels, load_dataset
from sdfast.models import mlp


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that has learned digits a little."""
    data = load_dataset("digits")
    model = mlp((64, 128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.train_inputs[:300]), data.train_labels[:300]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    torch.save(model.state_dict(), path)
    return model, path


def rounds(capsys, *words):
    """Exit code, and what was printed."""
    code = cli.main(["rounds", *map(str, words)])
    return code, capsys.readouterr()


def test_it_is_the_theory_on_the_networks_kernel(capsys, tmp_path, trained):
    model, path = trained
    words = ("--predict", path, "--hidden", 128, "--noise", 0.4, "--samples", 150, "--output", tmp_path / "out")
    code, said = rounds(capsys, *words, "--json")
    assert code == 0
    results = json.loads(said.out)
    data = load_dataset("digits")
    given = flip_labels(data.train_labels, 0.4, 10, generator=torch.Generator().manual_seed(0)).labels[:150]
    gram = ntk.gram(model.double(), data.train_inputs[:150].double(), outputs="mean")
    model.float()
    targets = np.eye(10)[given.numpy()]
    wanted = hilbert.self_distill(gram.numpy(), targets - targets.mean(0), relative_tolerance=0.05)
    assert results["best_round"] == int(wanted.best_round())
    np.testing.assert_allclose([row["c"] for row in results["rounds"]], np.ravel(wanted.c), rtol=1e-6)
    best = max(row["test"] for row in results["rounds"])
    assert results["rounds"][results["best_round"] - 1]["test"] > best - 0.1
    for name in ("results.json", "index.html"):
        assert (tmp_path / "out" / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--predict", "none.pt"), "--predict: there is no file none.pt"),
        (("--predict", "MODEL", "--hidden", 17), "--predict: "),
        (("--predict", "MODEL", "--epochs", 3), "--epochs: says how networks are trained, but --predict trains none"),
        (("--predict", "MODEL", "--tolerance", 2), "--tolerance: got 2.0, wanted between 0 and 1"),
        (("--predict", "MODEL", "--samples", 1), "--samples: got 1, wanted at least 2"),
        (("--tolerance", 0.1), "--tolerance: goes with --predict only"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, tmp_path, trained, words, message):
    words = [trained[1] if word == "MODEL" else word for word in words]
    code, said = rounds(capsys, *words, "--output", tmp_path / "out")
    assert code == 2
    assert said.err.startswith(f"sdfast rounds: error: {message}")
    assert said.err.count("\n") == 1
