"""The trainer under the real torchrun: two processes, kill -9, restarts; and checkpoints that are not for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdfast.data import Batches
from sdfast.train import SelfDistiller, processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
def test_killed_under_torchrun_it_ends_in_the_same_bits(tmp_path):
    """Two trainings, killed in different places and processes; torchrun ends the process that is left.

    Started by hand each time: with gloo, torchrun's own restarts find addresses of the processes that are gone.
    """
    script = Path(__file__).with_name("torchrun_training.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for start, (killed, last) in enumerate([(1, False), (0, False), (None, True)]):
        done = subprocess.run([*launch, str(start)], capture_output=True, text=True, timeout=200, env=environment)
        assert (done.returncode == 0) == last, done.stderr[-4000:]
        assert last or f"failed (exitcode: -9) local_rank: {killed}" in done.stderr, done.stderr[-4000:]
    assert [path.read_text() for path in tmp_path.glob("different-*")] == ["", ""]
    state = torch.load(tmp_path / "elr.pt", weights_only=True)
    assert len(state["others"]) == 1
    assert "optimizer" not in state["others"][0]["parts"]  # what they share is there once
    assert "method" in state["others"][0]["parts"]


def fit(path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    distiller = SelfDistiller(model, torch.optim.SGD(model.parameters(), 0.1), alpha=0.5)
    data = Batches(torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1]), 2)
    return distiller.fit(data, 2, checkpoint=path, progress=False)


def test_a_checkpoint_of_more_processes_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    fit(path)
    state = torch.load(path, weights_only=True)
    state["settings"]["processes"] = 2
    torch.save(state, path)
    with pytest.raises(ValueError, match="other settings: processes was 2 and is 1; give it those"):
        fit(path)


def test_models_of_their_own_have_no_checkpoint_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(NotImplementedError, match="checkpoint: 2 processes train models of their own; wanted one"):
        fit(tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()
