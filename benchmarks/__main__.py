"""Runs the benchmarks, prints one table, and records the run: ``python -m benchmarks [pytest arguments]``.

A run of all benchmarks is written to ``benchmarks/results/<device>/<operation>.json``; a run of some (with ``-k``) is
only printed. ``python -m benchmarks --report`` writes docs/performance.md from the recorded runs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.tables import print_run, write_report

HERE = Path(__file__).parent


def run_benchmarks(arguments: list[str]) -> list[dict]:
    """The pytest-benchmark results of a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--benchmark-only", "--benchmark-disable-gc",
                   "--benchmark-warmup=on", "--benchmark-warmup-iterations=5", "--benchmark-min-rounds=15",
                   "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={output}", *arguments]  # fmt: skip
        status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if status:
            raise SystemExit(status)
        return json.loads(output.read_text())["benchmarks"]


def compact(benchmark: dict) -> dict:
    """One row of a recorded run: seconds and what the benchmark said of itself."""
    stats = benchmark["stats"]
    return {
        "group": benchmark["group"],
        **benchmark["extra_info"],
        "median": stats["median"],
        "iqr": stats["iqr"],
        "rounds": stats["rounds"],
    }


def record(run: dict, operation: str) -> Path:
    """Writes a run beside the others of its device, whole or not at all."""
    folder = HERE / "results" / run["environment"]["device"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{operation}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def main(arguments: list[str]) -> None:
    """Prints and, where all ran, records."""
    if arguments == ["--report"]:
        print(write_report())
        return
    rows = [compact(each) for each in run_benchmarks(arguments)]
    run = {"environment": environment(f"make bench BENCH_ARGS={' '.join(arguments)!r}"), "rows": rows}
    print_run(run)
    if not any(argument.startswith("-k") for argument in arguments):
        print("recorded in", record(run, "self_distillation").relative_to(HERE.parent))
        print("report in", write_report())


if __name__ == "__main__":
    main(sys.argv[1:])
