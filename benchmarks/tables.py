"""Tables from recorded runs: for the terminal, and for docs/performance.md with the targets beside them."""

import importlib
import json
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "docs" / "performance.md"


def ratios(row: dict, peer: dict, timed: str = "turns") -> list[float]:
    """How many times the peer's time a row took, turn by turn."""
    return [ours / theirs for ours, theirs in zip(row[timed], peer[timed], strict=True)]


def fastest(rows: list[dict], prefix: str, timed: str = "turns") -> dict | None:
    """The fastest row whose name starts so."""
    return min(
        (row for row in rows if row["name"].startswith(prefix) and timed in row),
        key=lambda row: median(row[timed]),
        default=None,
    )


def gemm_rate(row: dict, about: dict) -> float:
    """Of the run's machine, in the row's dtype where that was measured."""
    return about.get(f"{row.get('dtype', 'float32')}_gemm_flops_per_second", about["gemm_flops_per_second"])


def floor_seconds(row: dict, about: dict) -> float:
    """The longer of a row's bytes at the copy rate and its FLOPs at the GEMM's of its run; 0 where none is known."""
    return max(row["floor_bytes"] / about["copy_bytes_per_second"], row["floor_flops"] / gemm_rate(row, about))


def device_time(row: dict) -> float:
    """Of one step in a CUDA graph where it was captured, else as it was called."""
    return median(row.get("graph_turns", row["turns"]))


def rate_cells(row: dict, about: dict) -> list[str]:
    """What the floor's bytes or FLOPs make of the row's time; the floor itself, and what share of the time it is."""
    floor, seconds = floor_seconds(row, about), device_time(row)
    if floor == 0:
        return ["", "", ""]
    if row["floor_flops"] / gemm_rate(row, about) == floor:
        rate, machine = f"{row['floor_flops'] / seconds / 1e9:,.1f} GFLOP/s", "GEMM"
    else:
        rate, machine = f"{row['floor_bytes'] / seconds / 1e9:,.1f} GB/s", "copy"
    return [rate, time(floor), f"{100 * floor / seconds:.0f} % of {machine}"]


def group_table(group: str, rows: list[dict], peers: dict[str, str], about: dict) -> list[str]:
    """A Markdown table of one group: the rates are those of the floor."""
    against = {heading: fastest(rows, prefix) for heading, prefix in peers.items()}
    on_gpu = any("host_turns" in row for row in rows)
    lines = [
        f"| {group} | time |{' in a graph | host |' if on_gpu else ''} rate | floor | of the machine | "
        f"{' | '.join(f'/ {heading}' for heading in peers)} | peak MiB |",
        "|---|---:|---:|---:|---:|" + "---:|" * (len(peers) + 1 + 2 * on_gpu),
    ]
    for row in rows:
        taken = time(median(row["turns"]))
        if "predicted_seconds" in row:
            taken += f" (predicted {time(row['predicted_seconds'])})"
        cells = [row["name"], taken]
        if on_gpu:
            cells += [time(median(row[key])) if key in row else "" for key in ("graph_turns", "host_turns")]
        cells += rate_cells(row, about)
        cells += [shown(median(ratios(row, peer))) if peer else "" for peer in against.values()]
        lines.append(f"| {' | '.join(cells)} | {row['peak_bytes'] / 2**20:.1f} |")
    return lines


def shown(ratio: float) -> str:
    """Two decimals, or two digits where that would leave fewer."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def time(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.2f} {unit}"
    return f"{seconds * 1e6:,.1f} µs"


def by_group(run: dict) -> dict[str, list[dict]]:
    """The rows by group."""
    groups: dict[str, list[dict]] = {}
    for row in run["rows"]:
        groups.setdefault(row["group"], []).append(row)
    return groups


def target_table(run: dict, module) -> list[str]:
    """Measured ratio against target, met or missed; the range leaves out a turn at each end."""
    shares = getattr(module, "SHARES", {})  # group -> row -> the least share of the time that its floor may be
    headings = [*module.PEERS, *(["of the floor"] if shares else [])]
    lines = [f"| group | row | {' | '.join(headings)} |", "|---|---|" + "---|" * len(headings)]
    for group, rows in by_group(run).items():
        by_name = {row["name"]: row for row in rows}
        for name, targets in module.TARGETS.get(group, {}).items():
            if name not in by_name:
                continue
            row = by_name[name]
            share = [share_verdict(row, run["environment"], shares.get(group, {}).get(name))] if shares else []
            for timed, label in (("turns", name), ("graph_turns", f"{name}, in a graph")):
                if timed not in row:
                    continue
                against = [fastest(rows, prefix, timed) for prefix in module.PEERS.values()]
                cells = [verdict(row, peer, target, timed) for peer, target in zip(against, targets, strict=True)]
                lines.append(f"| {group} | {label} | {' | '.join(cells + share)} |")
    return lines


def share_verdict(row: dict, about: dict, target: float | None) -> str:
    """One cell: which share of its time the row's floor is, and whether that is enough."""
    share = floor_seconds(row, about) / device_time(row)
    if target is None:
        return f"{100 * share:.0f} %"
    return f"{100 * share:.0f} %; target {100 * target:.0f} %: {'met' if share >= target else '**missed**'}"


def verdict(row: dict, peer: dict | None, target: float | None, timed: str = "turns") -> str:
    """One cell: the ratio, its range over the turns, and whether it keeps its target."""
    if peer is None:
        return ""
    turns = sorted(ratios(row, peer, timed))
    inner = turns[1:-1] or turns
    measured = f"{shown(median(turns))} ({shown(inner[0])}–{shown(inner[-1])})"
    if target is None:
        return measured
    return f"{measured}; target {target:.3g}: {'met' if median(turns) <= target else '**missed**'}"


def print_run(run: dict, operation: str) -> None:
    """Every group's table on the terminal."""
    module = importlib.import_module(f"benchmarks.bench_{operation}")
    about = run["environment"]
    print(f"{operation}: a large copy moves {about['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + written),", end=" ")
    print(f"a large float32 GEMM computes {about['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s")
    for group, rows in by_group(run).items():
        print(*group_table(group, rows, module.PEERS, about), "", sep="\n")
    print(*target_table(run, module), "", sep="\n")


def write_report() -> Path:
    """docs/performance.md from every recorded run."""
    lines = [
        "# Performance",
        "",
        "Generated by `python -m benchmarks --report` from the runs under `benchmarks/results/`. The rows of a group",
        "are timed in turns, each once in every turn; a time is the median of its turns, a ratio the median of the",
        "turns' ratios, with the range of the turns but the lowest and the highest in parentheses. Each implementation",
        "is checked against the float64 reference before it is timed; a peer that is wrong is left out of its group,",
        "such as a compiled composition of a bank whose backward reads the rows that its forward has written. A rate",
        "counts the floor: what the operation itself must read, write and compute; as a time, at this machine's copy",
        "or GEMM rate, measured in that run.",
        "On a GPU `time` is of eager calls, `host` what one costs the host, and the rate that of a graph's steps.",
    ]
    if all(path.parent.name.endswith("-cores") for path in RESULTS.glob("*/*.json")):
        lines.append("The CUDA and Triton backends have no recorded run yet: they are unproved on a GPU.")
    recorded = {path.stem for path in RESULTS.glob("*/*.json")}
    files = (path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if unrecorded := sorted(set(files) - recorded):
        lines.append(f"No run is recorded yet of: {', '.join(unrecorded)}.")
    for path in sorted(RESULTS.glob("*/*.json")):
        run = json.loads(path.read_text())
        about = run["environment"]
        module = importlib.import_module(f"benchmarks.bench_{path.stem}")
        lines += [
            "",
            f"## {path.stem} on {about['device']}",
            "",
            *module.__doc__.strip().splitlines(),
            "",
            f"`{about['command']}` at {about['commit']} on {about['date']}: torch {about['torch']}, Python "
            f"{about['python']}, {about['threads']} threads; a large copy moves "
            f"{about['copy_bytes_per_second'] / 1e9:.1f} GB/s, a large float32 GEMM computes "
            f"{about['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s.",
            "",
            "Time over each peer's:",
            "",
            *target_table(run, module),
        ]
        for group, rows in by_group(run).items():
            lines += ["", *group_table(group, rows, module.PEERS, about)]
    REPORT.write_text("\n".join(lines) + "\n")
    return REPORT.relative_to(ROOT)
