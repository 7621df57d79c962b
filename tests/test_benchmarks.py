"""The harness of the benchmarks: how turns become rows, rows become ratios, and what a wrong command says."""

import os
import subprocess
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks import tables
from benchmarks.harness import interleaved


def measured(name, turn, seconds, group="8x3"):
    """What pytest-benchmark says of a row in one turn, two steps a round."""
    about = {"name": name, "turn": turn, "steps": 2, "floor_bytes": 96, "floor_flops": 0, "peak_bytes": 0}
    return {"group": group, "extra_info": about, "stats": {"median": 2 * seconds}}


def test_a_ratio_is_the_median_of_the_turns_ratios():
    """A machine that is three times slower in one turn moves both rows of it, and no ratio."""
    slow = (1, 3, 1)
    timed = [measured("peer", turn, 2e-6 * slow[turn]) for turn in range(3)]
    timed += [measured("sdfast", turn, 1e-6 * slow[turn]) for turn in range(3)]
    peer, ours = command.combine(timed)
    assert ours["turns"] == pytest.approx([1e-6, 3e-6, 1e-6])
    assert tables.ratios(ours, peer) == pytest.approx([0.5, 0.5, 0.5])
    assert tables.verdict(ours, peer, 0.5) == "0.50 (0.50–0.50); target 0.5: met"
    assert tables.verdict(ours, peer, 0.4).endswith("**missed**")
    assert tables.fastest([peer, ours], "") is ours
    tiny = {"turns": [each / 100 for each in ours["turns"]]}
    assert tables.verdict(tiny, peer, 1 / 12) == "0.005 (0.005–0.005); target 0.0833: met"


def test_a_gpus_rows_have_a_floor_a_graph_and_a_share():
    """The floor is the longer of bytes and FLOPs, at the rates of this run; a graph's time is the device's."""
    timed = measured("sdfast", 0, 4e-6)
    timed["extra_info"] |= {"dtype": "bfloat16", "floor_flops": 5, "host": 3e-6, "graph": 2e-6}
    (row,) = command.combine([timed])
    assert (row["host_turns"], row["graph_turns"]) == ([3e-6], [2e-6])
    about = {"copy_bytes_per_second": 96e6, "gemm_flops_per_second": 1e3, "bfloat16_gemm_flops_per_second": 1e7}
    assert tables.floor_seconds(row, about) == 1e-6
    assert tables.rate_cells(row, about)[1:] == ["1.0 µs", "50 % of copy"]
    assert tables.share_verdict(row, about, 0.5) == "50 %; target 50 %: met"
    assert tables.share_verdict(row, about, 0.6).endswith("**missed**")
    assert tables.floor_seconds(row | {"floor_flops": 40}, about) == 4e-6
    assert tables.floor_seconds(row | {"dtype": "float32"}, about) == 5e-3
    assert "| in a graph | host |" in tables.group_table("8x3", [row], {}, about)[0]


def test_rows_take_turns():
    mark = interleaved(["a", "b"], ["x", "y"], turns=2).mark
    assert [case.values for case in mark.args[1]] == [
        ("a", 0, "x"), ("a", 0, "y"), ("a", 1, "x"), ("a", 1, "y"),
        ("b", 0, "x"), ("b", 0, "y"), ("b", 1, "x"), ("b", 1, "y"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"), [(["nonsense"], "wanted some of"), (["self_distillation", "--group", "9x9"], "128x10")]
)
def test_a_wrong_name_is_one_line(arguments, said):
    # Without what pytest-xdist tells its workers: pytest-benchmark would take itself for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode
    assert said in run.stderr
    assert "Traceback" not in run.stderr
