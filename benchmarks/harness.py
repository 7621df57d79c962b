"""How every benchmark runs: each row of a group once, then all of them again, turn after turn.

A machine's speed drifts; rows timed one after another would each meet another machine. A ratio of two rows is the
median of its turns' ratios. A benchmark file ``bench_<operation>.py`` holds ``PEERS`` (a column's heading -> the prefix
of the rows of which the fastest counts), ``TARGETS`` (group -> row -> one ratio or None a column) and one test::

    @interleaved(groups, names)
    def test_operation(benchmark, group, turn, name):
        measure(benchmark, group, turn, name, prepare)

where ``prepare(group, name)`` checks the row against the reference and returns its `Case`; the tensors it makes live on
`DEVICE` by themselves. On a GPU one timed round is many steps and one synchronisation.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
import torch

from benchmarks.shapes import ON_GPU, TINY

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TURNS = 1 if TINY else 5 if ON_GPU else 7
# Inputs rotate among enough copies to leave the last-level cache.
CACHE_BYTES, MOST_COPIES = (256 << 20, 64) if ON_GPU else (64 << 20, 8)


@dataclass
class Case:
    """One row of one group, ready to be timed: the floors are what the operation itself must move and compute."""

    step: Callable[[], object]
    floor_bytes: int = 0
    floor_flops: int = 0
    rounds: int | None = None  # for steps of seconds: this many rounds a turn, not calibrated
    copies: int = 8  # steps that a CUDA graph holds: as many as there are inputs to rotate among
    about: dict = field(default_factory=dict)  # recorded as it is


def interleaved(groups: Iterable[str], names: Iterable[str], turns: int = TURNS):
    """Parametrises a test over (group, turn, name): all rows of a group in one turn before any in the next."""
    names = list(names)
    cases = [
        pytest.param(group, turn, name, id=f"{group} {name} #{turn}")
        for group in groups
        for turn in range(turns)
        for name in names
    ]
    return pytest.mark.parametrize(("group", "turn", "name"), cases)


_group: str | None = None
_prepared: dict[str, Case] = {}
_left_out: dict[str, str] = {}  # rows that do not fit in memory, and peers that are wrong: in every turn alike


def copies_of(size: int) -> int:
    """How many inputs of so many bytes a group rotates among."""
    return max(1, min(MOST_COPIES, CACHE_BYTES // size))


def compiled(function: Callable) -> Callable:
    """By torch.compile; in a dry run, traced alone."""
    return torch.compile(function, fullgraph=True, backend="eager" if TINY else "inductor")


def measure(benchmark, group: str, turn: int, name: str, prepare: Callable[[str, str], Case]) -> None:
    """Times one row in one turn; what `prepare` made lives until the next group."""
    global _group
    if group != _group:
        _group = group
        _prepared.clear()
        _left_out.clear()
        torch._dynamo.reset()
    if name not in _prepared:
        if name in _left_out:
            pytest.skip(_left_out[name])
        try:
            with DEVICE:
                _prepared[name] = prepare(group, name)
            if DEVICE.type == "cpu" and not _prepared[name].rounds and is_slow(_prepared[name].step):
                _prepared[name].rounds = 2
            if "peak_bytes" not in _prepared[name].about:  # measured by `prepare` where torch does not allocate
                _prepared[name].about["peak_bytes"] = peak_bytes(_prepared[name].step)
        except (torch.cuda.OutOfMemoryError, AssertionError) as error:
            if isinstance(error, AssertionError) and name.startswith("sdfast"):
                raise
            _prepared.pop(name, None)
            _left_out[name] = f"{group} {name}: {error}"
            print(f"left out: {_left_out[name]}", file=sys.stderr)
            pytest.skip(_left_out[name])
    case = _prepared[name]
    if DEVICE.type == "cpu":
        time.sleep(0.1)  # OpenBLAS's threads, of a row before, spin for some 30 ms before they sleep
    steps = 1 if DEVICE.type == "cpu" or case.rounds else steps_worth_a_synchronisation(case.step)
    benchmark.group = group
    benchmark.extra_info.update(
        name=name, turn=turn, steps=steps, floor_bytes=case.floor_bytes, floor_flops=case.floor_flops, **case.about
    )
    timed = case.step if DEVICE.type == "cpu" else lambda: synchronised(case.step, steps)
    if case.rounds:
        benchmark.pedantic(timed, rounds=case.rounds, iterations=1, warmup_rounds=0)
    else:
        benchmark(timed)
        if DEVICE.type == "cuda":
            benchmark.extra_info.update(on_gpu(case))


def is_slow(step: Callable[[], object]) -> bool:
    """Whether a turn's calibration and warm-up would cost more than they tell."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start > 0.05


def on_gpu(case: Case) -> dict[str, float]:
    """Seconds of the host for one call, and of the device for one step of a replayed CUDA graph.

    The graph's figure is the device's alone: no launch waits for the host.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        case.step()
    found = {"host": (time.perf_counter() - start) / 20}
    torch.cuda.synchronize()
    graph = None if "no_graph" in case.about else captured(case)
    if graph is not None:
        replays = steps_worth_a_synchronisation(graph.replay)
        start = time.perf_counter()
        synchronised(graph.replay, replays)
        found["graph"] = (time.perf_counter() - start) / (replays * case.copies)
        del graph
        torch.cuda.empty_cache()  # its memory is nobody else's until then
    return found


def captured(case: Case) -> "torch.cuda.CUDAGraph | None":
    """The case's steps in one CUDA graph, or None where a step reads the device from the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            case.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(case.copies):
                case.step()
    except RuntimeError as error:
        case.about["no_graph"] = str(error).splitlines()[0]
        torch.cuda.synchronize()
        return None
    return graph


def synchronised(step: Callable[[], object], steps: int) -> None:
    """Launches so many steps and waits for all."""
    for _ in range(steps):
        step()
    torch.cuda.synchronize()


def steps_worth_a_synchronisation(step: Callable[[], object]) -> int:
    """How many steps take about two milliseconds."""
    synchronised(step, 3)
    start = time.perf_counter()
    synchronised(step, 10)
    return max(1, round(0.002 / ((time.perf_counter() - start) / 10)))


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that torch's allocator holds during one step beyond what it held before."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
