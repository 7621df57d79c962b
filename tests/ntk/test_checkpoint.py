"""A run that dies continues with the same bits; a checkpoint of another run is refused with the difference named."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sdfast.ntk import checkpoint, gram
from sdfast.ntk.progress import Progress

from . import killed_gram

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed_gram.py"), str(tmp_path / "c.pt"), str(tmp_path / "h.pt")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


def test_kill_and_continue(tmp_path):
    process = start(tmp_path)
    for seen, _ in enumerate(process.stdout):
        if (tmp_path / "c.pt").exists() and seen > 40:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "h.pt").exists()
    done = torch.load(tmp_path / "c.pt")["done"]
    assert done > 0
    process = start(tmp_path)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    model, x = killed_gram.model_and_samples()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = gram(model, x, **killed_gram.OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "h.pt"), whole)
    assert told.count("forward") > 0


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(torch.initial_seed())
    return {"model": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "x1": torch.randn(5, 3), "outputs": "trace",
            "checkpoint": tmp_path / "c.pt", "memory": 200}  # fmt: skip


@pytest.mark.parametrize("failing_at", [1, 2, 3])
def test_every_group_is_kept(run, failing_at, monkeypatch):
    """An error in a later group; then only what is missing is done."""
    whole = gram(**{**run, "checkpoint": None})
    saved = []
    original = checkpoint.Checkpoint.save

    def save(self, done, *arguments, **options):
        self._next = 0
        original(self, done, *arguments, **options)
        saved.append(done)
        if len(saved) == failing_at:
            raise OSError("no space left")

    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    with pytest.raises(OSError, match="no space"):
        gram(**run)
    assert torch.equal(gram(**run), whole)
    assert saved == sorted(set(saved)), "a group was done twice"
    before = len(saved)
    assert torch.equal(gram(**run), whole)
    assert len(saved) == before


def changed(run, name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.load_state_dict(run["model"].state_dict())
    if name == "parameters and buffers of the model":
        with torch.no_grad():
            model[0].bias[0] += 1e-6
        return {"model": model}
    if name == "training mode":
        return {"model": model.eval()}
    if name == "x1":
        return {"x1": run["x1"] * 1.0000001}
    return {
        "x2": {"x2": torch.randn(5, 3)},
        "outputs": {"outputs": "mean"},
        "precision": {"precision": "bf16"},
        "params": {"params": ["0.*"]},
        "batch_size": {"batch_size": 2},
        "memory": {"memory": 500},
        "model class": {"model": type("Other", (nn.Sequential,), {})(*model)},
    }[name]


@pytest.mark.parametrize(
    "name",
    ["parameters and buffers of the model", "training mode", "x1", "x2", "outputs", "precision", "params", "batch_size",
     "memory", "model class"],
)  # fmt: skip
def test_another_run_is_refused(run, name):
    gram(**run)
    with pytest.raises(ValueError, match=rf"checkpoint: .*c.pt is of another run: (.*; )?{name} was .* and is .*"):
        gram(**{**run, **changed(run, name)})


def test_other_code_with_the_same_weights_is_refused(run):
    """What an activation, or a callable, does stands in no parameter and in no name."""

    def column(number):
        return lambda out: out[:, number]

    run["outputs"] = column(0)
    gram(**run)
    first, second = run["model"]
    for changes in ({"model": nn.Sequential(nn.Sequential(first), nn.Tanh(), second)}, {"outputs": column(1)}):
        with pytest.raises(ValueError, match=r"c.pt is of another run: "):
            gram(**{**run, **changes})
    first.register_forward_hook(lambda module, arguments, output: output.square())
    with pytest.raises(
        ValueError, match=r"of another run: the model, or the callable outputs, gave \[.*\] on the first"
    ):
        gram(**run)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "other"])
def test_what_is_no_checkpoint_is_refused(run, content):
    path = run["checkpoint"]
    if content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint of a Gram matrix"):
        gram(**run)


def test_no_folder(run, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: .*nowhere is no folder"):
        gram(**{**run, "checkpoint": tmp_path / "nowhere" / "c.pt"})


def test_progress_shows_a_bar(run, capsys):
    gram(**{**run, "checkpoint": None}, progress=True)
    shown = capsys.readouterr().err
    assert "Gram matrix: 100%" in shown
    gram(**{**run, "checkpoint": None})
    assert capsys.readouterr().err == ""


def test_progress_tells_the_truth(monkeypatch):
    """Passes of 10 s, products of 1 s a column: what is to come is known from the middle of the first group on."""
    now = [0.0]
    monkeypatch.setattr("sdfast.ntk.progress.time.monotonic", lambda: now[0])
    bar = Progress([4, 4, 2], False)
    told = []
    monkeypatch.setattr(bar, "_show", lambda left: told.append(bar.remaining(left)))
    wanted = []
    for width in (4, 4, 2):
        for act, seconds in ((bar.passed, 10), (bar.multiplied, width)):
            for share in (0.5, 1.0):
                now[0] += seconds / 2
                act(share)
                wanted.append(3 * 10 + 10 - now[0])
    bar.close()
    assert told[2:] == pytest.approx(wanted[2:])
