"""Real processes that share a matrix: the same H as one, a failure told to all, a continuation by the checkpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdfast.ntk import distributed, gram, plan

from . import shared_gram, zoo
from .oracle import distance

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


SAME = "same,small,columns,out,format,differ"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Every scenario once, by one starter: its folder, and the exit codes by scenario."""
    folder = tmp_path_factory.mktemp("shared")
    scenarios = [f"{SAME}:2:two", f"{SAME}:3:three"]
    scenarios += [f"{name}:2:{how}" for how in ("die", "raise") for name in (how, "continue")]
    scenarios += ["argument:2:argument", "bad:2:bad", "broken:2:broken"]
    full = [f"{name}:{world}:{folder / where}" for name, world, where in (s.split(":") for s in scenarios)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "shared_gram.py"), *full]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    codes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(codes) == len(scenarios), done.stderr
    return folder, {tuple(s.split(":")[::2]): code for s, code in zip(scenarios, codes, strict=True)}


@pytest.mark.parametrize(("world", "where"), [(2, "two"), (3, "three")])
def test_several_processes_are_one(world, where, shared):
    folder, codes = shared
    assert codes[SAME, where] == [1] * world, "the last of them is refused"
    model, x = shared_gram.model_and_samples()
    whole = gram(model, x, **shared_gram.OPTIONS)
    wanted = {"same": whole, "small": whole, "out": whole, "columns": gram(model, x, x[:7] * 2, **shared_gram.OPTIONS)}
    for name, matrix in wanted.items():
        shares = [torch.load(folder / where / f"{name}.{rank}.pt") for rank in range(world)]
        assert all(torch.equal(share, shares[0]) for share in shares)
        assert distance(shares[0], matrix) <= 1e-6
        assert name == "columns" or torch.equal(shares[0], shares[0].T)
    model, pictures = shared_gram.convolutions_and_pictures()
    matrix = gram(model, pictures, **shared_gram.OPTIONS)
    for rank in range(world):
        assert distance(torch.load(folder / where / f"format.{rank}.pt")[0], matrix) <= 1e-6
    for rank in range(world):
        told = (folder / where / f"differ.{rank}.txt").read_text()
        assert re.match(r"ValueError: group: rank \d and rank \d differ in x1, wanted the same everywhere", told)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("where", ["two", "three"])
def test_a_format_that_one_process_refuses_is_given_up_in_all(where, shared):
    world = 2 if where == "two" else 3
    folder = shared[0] / where
    told = [json.loads((folder / f"tried.{rank}.txt").read_text()) for rank in range(world)]
    assert told == [[True, False]] * world, "tried once, and not again"
    matrices = [torch.load(folder / f"format.{rank}.pt") for rank in range(world)]
    assert all(torch.equal(first, again) and torch.equal(first, matrices[0][0]) for first, again in matrices)


@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_process_that_ends_ends_all_and_the_checkpoints_continue(how, shared):
    folder, codes = shared[0] / how, shared[1]
    assert codes[how, how] == [1, 9 if how == "die" else 1], "a process took a matrix for whole that is not"
    told = (folder / "checkpoint.0.txt").read_text()
    assert ("a process is gone" if how == "die" else "rank 1 failed with OSError: disk") in told
    assert "checkpoint" in told
    if how == "raise":
        assert (folder / "checkpoint.1.txt").read_text() == "OSError: disk"
    assert codes["continue", how] == [0, 0]
    model, x = shared_gram.model_and_samples()
    shares = [torch.load(folder / f"checkpoint.{rank}.pt") for rank in range(2)]
    assert torch.equal(*shares)
    assert distance(shares[0], gram(model, x, **shared_gram.OPTIONS)) <= 1e-6
    kept = [torch.load(folder / f"before.{rank}.pt") for rank in range(2)]
    assert all(kept), "nothing was there to continue"
    assert [torch.load(folder / f"c.pt.{rank}")["done"] for rank in range(2)] >= kept


@pytest.mark.parametrize(
    ("scenario", "file", "reason"),
    [
        ("argument", "argument", "ValueError: params: 'none' matches none of the parameters 0.weight, .*"),
        ("bad", "bad", "ValueError: x1: got float64, wanted float32 as the model's parameters"),
        ("broken", "checkpoint", "ValueError: checkpoint: .*c.pt.1 is no checkpoint of a Gram matrix: .*"),
    ],
)
def test_what_a_process_refuses_ends_all_with_its_reason(scenario, file, reason, shared):
    folder, codes = shared[0] / scenario, shared[1]
    assert codes[scenario, scenario] == [1, 1]
    assert re.fullmatch(reason, (folder / f"{file}.1.txt").read_text())
    told = (folder / f"{file}.0.txt").read_text()
    assert re.fullmatch(f"RuntimeError: group: rank 1 failed with {reason}", told)
    assert "started again" not in told, "that would fail again"


def test_a_message_that_fails_is_told_by_its_class():
    class UnsayableError(Exception):
        def __str__(self):
            raise RuntimeError("no message")

    assert distributed._told(UnsayableError()) == "UnsayableError"
    assert distributed._told(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert distributed._told(ValueError("first\nsecond")) == "ValueError: first"
    assert len(distributed._told(ValueError("x" * 10**5))) < 600


def test_processes_share_evenly():
    """Every group once, and none with more than its part and one group."""
    model = zoo.mlp()
    made = plan(model, torch.randn(30, 4), outputs="sum", memory=1500)
    shards = distributed.Shards(None)
    for world in (1, 2, 3, 50):
        shares = []
        for rank in range(world):
            shards.rank, shards.world = rank, world
            shares.append(shards.mine(made))
        together = [group for share in shares for group in share]
        assert sorted(together) == sorted(made.groups)
        loads = [sum(group.width for group in share) for share in shares]
        assert max(loads) <= sum(loads) / world + max(group.width for group in made.groups)


def test_bad_input():
    model, x = zoo.mlp(), torch.randn(4, 4)
    with pytest.raises(RuntimeError, match=r"group: torch\.distributed is not initialised"):
        gram(model, x, outputs="sum", group=object())
