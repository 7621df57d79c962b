"""Runs an experiment's seeds, each to a file of its own, and writes what they say together."""

import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sdfast
from sdfast import _dispatch, _files, _locks, plots
from sdfast.experiments.experiment import Experiment, Summary, load

RESULTS = "results.json"
SETTINGS = "settings.json"

# What one seed may die of without taking the others along.
FAILURES = (ArithmeticError, RuntimeError, MemoryError, ValueError, OSError)


def run(
    name: str, preset: str, settings: Any, folder: Path, resume: bool, tick: Callable[[str], object]
) -> dict[str, Any]:
    """Runs all seeds of an experiment that its folder lacks, and writes results.json and curves.png.

    Args:
        name: Of the experiment.
        preset: From which the settings come.
        settings: Of the run.
        folder: Of this experiment.
        resume: Take the seeds that are there.
        tick: Called after each seed, with a word on it.

    Returns:
        What results.json holds.

    Raises:
        ValueError: The folder holds other settings, or seeds without `resume`.
        RuntimeError: Every seed failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locks.held(folder, "sdfast reproduce"):
        _check_settings(folder, settings, resume)
        experiment = load(name)
        failures: dict[int, str] = {}
        seeds: dict[int, dict[str, Any]] = {}
        missing = [seed for seed in range(settings.seeds) if not _seed_path(folder, seed).exists()]
        for seed in sorted(set(range(settings.seeds)) - set(missing)):
            seeds[seed] = json.loads(_seed_path(folder, seed).read_text(encoding="utf-8"))
            tick(f"{name}, seed {seed}: there already")
        for seed, values in _seeds(name, settings, folder, missing):
            if isinstance(values, str):
                failures[seed] = values
            else:
                seeds[seed] = values
            tick(f"{name}, seed {seed}")
        if not seeds:
            raise RuntimeError(f"{name}: every seed failed; the first: {failures[min(failures)]}")
        summary = experiment.summarise(settings, dict(sorted(seeds.items())))
        results = _results(name, preset, experiment, settings, seeds, failures, summary)
        text = json.dumps(results, indent=1)
        _files.write_text(folder / RESULTS, text + "\n")
        if summary.figure is not None and plots.why_not() is None:
            plots.save(summary.figure(), folder / "curves.png")
    return json.loads(text)  # as a later page will read it


def begun(folder: Path) -> bool:
    """Whether an experiment was ever started there."""
    return (folder / SETTINGS).exists() or any(folder.glob("seed-*"))


def _check_settings(folder: Path, settings: Any, resume: bool) -> None:
    """The settings but for the number of seeds and processes, which change no seed's result."""
    path = folder / SETTINGS
    now = json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in ("seeds", "jobs", "download")}))
    if any(folder.glob("seed-*")):  # a seed's values, or what one that was cut short goes on from
        if not resume:
            raise ValueError(f"--output: {folder} holds seeds; add --resume to take them, or name another folder")
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        differing = [f"{n} was {saved.get(n)!r} and is {now.get(n)!r}" for n in sorted({*saved, *now})
                     if saved.get(n) != now.get(n)]  # fmt: skip
        if differing:
            raise ValueError(f"--resume: {folder} has other settings: {'; '.join(differing)}; name another --output")
    _files.write_text(path, json.dumps(now, indent=1) + "\n")


def _seed_path(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.json"


def _seeds(name: str, settings: Any, folder: Path, missing: list[int]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each seed's values, or why it failed, as they come."""
    if settings.jobs <= 1 or len(missing) < 2:
        for seed in missing:
            yield seed, run_seed(name, settings, folder, seed, None if settings.jobs <= 1 else 1)
        return
    lost = []  # a process that dies takes along what its pool still had to do
    for seed, values in _in_processes(name, settings, folder, missing):
        if values is None:
            lost.append(seed)
        else:
            yield seed, values
    for seed in lost:
        for _, values in _in_processes(name, settings, folder, [seed]):
            yield seed, "its process died twice: killed, or out of memory" if values is None else values


def _in_processes(
    name: str, settings: Any, folder: Path, seeds: list[int]
) -> Iterator[tuple[int, dict[str, Any] | str | None]]:
    """Each seed's values as they come, or ``None`` where the processes died."""
    context = multiprocessing.get_context("spawn")  # a forked process would share torch's thread pools
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(settings.jobs, len(seeds)), mp_context=context, initializer=_end_with_parent)
    try:
        futures = {pool.submit(run_seed, name, settings, folder, seed, 1): seed for seed in seeds}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None
    except BaseException:  # Ctrl-C, or a defect: the seeds under way need not be waited for
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process when that dies, which may be killed without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own would be one between processes, which a killed one leaves behind
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_seed(name: str, settings: Any, folder: Path, seed: int, threads: int | None) -> dict[str, Any] | str:
    """One seed's values, written to its file; or why it failed."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    try:
        values = load(name).run_seed(settings, seed, folder / f"seed-{seed}")
    except FAILURES as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(before)
    values = {**values, "seconds": time.perf_counter() - began}
    _files.write_text(_seed_path(folder, seed), json.dumps(values) + "\n")
    return values


def _results(
    name: str, preset: str, experiment: Experiment, settings: Any, seeds: dict[int, dict[str, Any]],
    failures: dict[int, str], summary: Summary,
) -> dict[str, Any]:  # fmt: skip
    return {
        "experiment": name,
        "title": experiment.title,
        "source": experiment.source,
        "question": experiment.question,
        "unstated": experiment.unstated,
        "preset": preset,
        "settings": asdict(settings),
        "environment": {
            "sdfast": sdfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": settings.device,
            "backend": _dispatch.automatic(torch.device(settings.device).type),
        },
        "reading": summary.reading,
        "claims": [claim._asdict() for claim in summary.claims],
        "tables": [list(table) for table in summary.tables],
        "failures": failures,
        "seeds": {str(seed): values for seed, values in sorted(seeds.items())},
    }
