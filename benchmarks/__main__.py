"""Runs the benchmarks of some operations or of all, prints their tables, and records each whole run.

A run of an operation's whole file is written to ``benchmarks/results/<device>/<operation>.json``, and then
docs/performance.md is written anew from all recorded runs; a run of some groups (``--group 128x10``) is only printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.environment import environment
from benchmarks.shapes import ON_GPU, TINY
from benchmarks.tables import floor_seconds, print_run, write_report
from sdfast import _files

HERE = Path(__file__).parent
OPERATIONS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def run_benchmarks(operation: str, groups: list[str]) -> list[dict]:
    """The pytest-benchmark results of a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", str(HERE / f"bench_{operation}.py"), "-q", "--benchmark-only",
                   "--benchmark-disable-gc", "--benchmark-warmup=on", "--benchmark-warmup-iterations=3",
                   "--benchmark-min-rounds=3", f"--benchmark-max-time={0.05 if ON_GPU else 0.2}",
                   "--benchmark-columns=median,iqr,rounds",
                   "-p", "no:cacheprovider", f"--benchmark-json={output}"]  # fmt: skip
        command += [f"--group={group}" for group in groups]
        quiet = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False
        )  # its tables would not combine turns
        if quiet.returncode:
            sys.stderr.write(quiet.stdout)
            raise SystemExit(quiet.returncode)
        return json.loads(output.read_text())["benchmarks"] if output.exists() else []


def combine(benchmarks: list[dict]) -> list[dict]:
    """One row for each (group, name): its median seconds turn by turn, and what the benchmark said of itself."""
    rows: dict[tuple[str, str], dict] = {}
    for benchmark in benchmarks:
        about = dict(benchmark["extra_info"])
        name, _, steps = about.pop("name"), about.pop("turn"), about.pop("steps")
        on_gpu = {f"{key}_turns": about.pop(key) for key in ("host", "graph") if key in about}
        row = rows.setdefault(
            (benchmark["group"], name), {"group": benchmark["group"], "name": name, **about, "turns": []}
        )
        row["turns"].append(benchmark["stats"]["median"] / steps)
        for key, seconds in on_gpu.items():
            row.setdefault(key, []).append(seconds)
    return list(rows.values())


def record(run: dict, operation: str) -> Path:
    """Writes a run beside the others of its device, whole or not at all."""
    folder = HERE / "results" / run["environment"]["device"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{operation}.json"
    _files.write_text(path, json.dumps(run, indent=1) + "\n")
    return path


def main() -> None:
    """Prints and, where all ran, records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)}; default: all")
    parser.add_argument("--group", action="append", default=[], help="only this group of rows; may be repeated")
    parser.add_argument("--output", type=Path, help="write the run of one operation to this file too")
    parser.add_argument("--report", action="store_true", help="only write docs/performance.md from the recorded runs")
    arguments = parser.parse_args()
    if arguments.output and len(arguments.operations) != 1:
        parser.error(f"--output: got {len(arguments.operations)} operations, wanted one")
    if unknown := set(arguments.operations) - set(OPERATIONS):
        parser.error(f"OPERATION: got {', '.join(sorted(unknown))}, wanted some of {', '.join(OPERATIONS)}")
    if not arguments.report:
        for operation in arguments.operations or OPERATIONS:
            rows = combine(run_benchmarks(operation, arguments.group))
            if not rows:
                print(f"{operation}: nothing to time on this device")
                continue
            about = environment(f"make bench BENCH_ARGS={operation}")
            run = {"environment": about, "rows": [row | {"floor_seconds": floor_seconds(row, about)} for row in rows]}
            print_run(run, operation)
            if arguments.output:
                _files.write_text(arguments.output, json.dumps(run, indent=1) + "\n")
            if not arguments.group and not TINY:
                print("recorded in", record(run, operation).relative_to(HERE.parent))
    if arguments.report or not (arguments.group or TINY):
        print("report in", write_report())


if __name__ == "__main__":
    main()
