"""Every row of a benchmark's groups for one step: what a profiler or a sanitizer watches.

``python -m benchmarks.one_step OPERATION [GROUP]`` runs the package's rows; ``sanitizer`` instead of an operation the
small cases of every kernel; ``--table FILE`` prints what Nsight Compute wrote.
"""

import argparse
import csv
import importlib

import torch

from benchmarks.harness import DEVICE

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
    "smsp__inst_executed_op_local_st.sum": "spill stores",
}


def run_operation(operation: str, groups: list[str]) -> None:
    """The package's rows of the groups, each once after one to compile it."""
    module = importlib.import_module(f"benchmarks.bench_{operation}")
    mark = next(m for f in vars(module).values() for m in getattr(f, "pytestmark", ()) if m.name == "parametrize")
    for group, turn, name in (case.values for case in mark.args[1]):
        if turn or "sdfast" not in name or "compiled" in name or (groups and group not in groups):
            continue
        with DEVICE:
            case = module.prepare(group, name)
            case.step()
            case.step()
        print(f"{group} {name}", flush=True)


def run_small_cases() -> None:
    """Each kernel on shapes of a few blocks: aligned and not, one launch and two, all options of a target."""
    import sdfast

    def both(loss, leaf):
        torch.autograd.grad(loss.sum(), leaf)

    for rows, classes in ((5, 3), (128, 10), (70, 1000), (600, 129), (3, 50_257)):
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(rows, classes, device=DEVICE).to(dtype).requires_grad_()
            source, labels = torch.randn_like(logits), torch.randint(0, classes, (rows,), device=DEVICE)
            labels[0] = -100
            bank = sdfast.PredictionBank(rows, classes, device=DEVICE)
            indices = torch.randint(0, rows, (rows,), device=DEVICE)
            # Triton compiles every combination anew: two shapes stand for all.
            some = dtype == torch.float32 and classes in (1000, 50_257)
            for backend in [None] if DEVICE.type == "cpu" else ["cuda", "triton"] if some else ["cuda"]:
                for options in (
                    {}, {"label_fn": "softmax", "temperature": 0.5}, {"source": source}, {"reduction": "none"},
                    {"loss": "brier", "label_smoothing": 0.1}, {"target_temperature": 0.5, "label_fn": "softmax"},
                    {"row_weight": sdfast.GeneralizedCrossEntropy(0.7)},
                ):  # fmt: skip
                    for alpha in (0.5, sdfast.AdaptiveAlpha(0.7)):
                        both(sdfast.self_distillation_loss(logits, labels, alpha, backend=backend, **options), logits)
                rows_of = bank.rows(indices)
                both(sdfast.self_distillation_loss(logits, labels, 0.5, source=rows_of, backend=backend), logits)
                both(sdfast.elr_loss(logits, labels, bank.rows(indices), backend=backend), logits)
            both(sdfast.distillation_loss(logits, source, labels), logits)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("the small cases ran")


def print_table(path: str) -> None:
    """One line for each kernel and launch size: the medians of its launches."""
    with open(path) as file:
        lines = [line for line in file if not line.startswith("==")]
    rows = list(csv.DictReader(lines))
    units, launches = rows[0], rows[1:]
    by_kernel: dict[tuple[str, str], list[dict]] = {}
    for row in launches:
        by_kernel.setdefault((row["Kernel Name"][:60], row.get("launch__grid_size", "")), []).append(row)
    print("| kernel | launches |", *(f"{label} {units.get(metric) or ''} |" for metric, label in METRICS.items()))
    for (kernel, _), found in by_kernel.items():
        cells = [sorted(row.get(metric, "") for row in found)[len(found) // 2] for metric in METRICS]
        print(f"| {kernel} | {len(found)} | {' | '.join(cells)} |")


def main() -> None:
    """Runs or prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_step", description=__doc__.splitlines()[0])
    parser.add_argument("operation", nargs="?", help="of the benchmarks, or 'sanitizer'")
    parser.add_argument("groups", nargs="*", help="default: all")
    parser.add_argument("--table", help="print this file of Nsight Compute's")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table)
    elif arguments.operation == "sanitizer":
        run_small_cases()
    elif arguments.operation:
        run_operation(arguments.operation, arguments.groups)
    else:
        parser.error("operation: got none, wanted one or --table")


if __name__ == "__main__":
    main()
