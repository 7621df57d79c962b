"""Runs that are killed, and processes that die: nothing that was done is lost, and nothing goes on by itself."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest

from sdfast.experiments import dong2019_table1, runner
from sdfast.experiments.experiment import load

SHORT = {"epochs": 2, "hidden": (8,), "noises": (0.0, 0.4), "ratios": (1.0, 1.0), "cnn_seeds": 0}


def reproduce(folder, resume):
    settings = replace(load("dong2019_table1").presets["small"], seeds=2, jobs=1, **SHORT)
    return runner.run("dong2019_table1", "small", settings, folder, resume, lambda _: None)


def values(results):
    return {seed: {k: v for k, v in found.items() if k != "seconds"} for seed, found in results["seeds"].items()}


def started(folder):
    """The command in a process of its own, once it has something to lose, and its children's numbers."""
    short = ["epochs=2", "hidden=8", "noises=0,0.4", "ratios=1,1", "cnn_seeds=0"]
    words = ["dong2019_table1", "--seeds", "2", "--jobs", "2", "--output", str(folder), "--no-progress"]
    process = subprocess.Popen([sys.executable, "-m", "sdfast", "reproduce", *words, "--set", *short])
    until = time.monotonic() + 120
    while not list(folder.glob("dong2019_table1/seed-*/cells.json")):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail("wrote nothing to go on from")
        time.sleep(0.02)
    return process, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def alive(child):
    try:
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the processes of a command")
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, monkeypatch):
    process, children = started(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert children
    assert not any(map(alive, children))  # they do not go on by themselves
    folder = tmp_path / "dong2019_table1"
    cells = sum(len(json.loads(path.read_text())) for path in folder.glob("seed-*/cells.json"))
    trained, train = [], dong2019_table1._train
    monkeypatch.setattr(dong2019_table1, "_train", lambda *all: trained.append(all) or train(*all))
    resumed = reproduce(folder, True)
    assert cells > 0
    assert len(trained) == 36 - cells  # 2 seeds, 2 rates, 9 methods
    assert values(resumed) == values(reproduce(tmp_path / "whole", False))


def test_an_interrupted_run_ends_its_processes_and_one_of_them_that_dies_loses_nothing(tmp_path):
    settings = replace(load("theorem1").presets["small"], seeds=4, jobs=2, width=50, steps=1000, contrasts=0)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run("theorem1", "small", settings, tmp_path, False, interrupt)
    assert active_children() == []
    with pytest.raises(ValueError, match=r"--output: .* holds seeds; add --resume"):
        runner.run("theorem1", "small", settings, tmp_path, False, interrupt)

    def kill(_):
        for child in active_children()[:1]:
            child.kill()

    results = runner.run("theorem1", "small", settings, tmp_path, True, kill)
    assert results["failures"] == {}
    assert list(results["seeds"]) == ["0", "1", "2", "3"]
