"""``sdfast reproduce``: the papers' figures and tables, one command each, at paper scale or small."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdfast import plots, report
from sdfast.experiments import page, runner
from sdfast.experiments.experiment import NAMES, changed, load
from sdfast.train.flags import CAN_RESUME, check_resume

PRESETS = ("small", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    parser.add_argument("--all", action="store_true", help="run all of them")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="small",
        help="bundled digits on a CPU in minutes, or the paper's own scale",
    )
    parser.add_argument("--seeds", type=int, help="how many (default: the preset's)")
    parser.add_argument("--jobs", type=int, help="processes of one thread each (default: the preset's)")
    parser.add_argument("--device", help="where to train (default: the preset's)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the data set, where it has one")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of one experiment")
    parser.add_argument("--output", type=Path, default=Path("sdfast-papers"), help="folder of results and report")
    parser.add_argument("--resume", action="store_true", help="take the seeds that are in that folder")
    parser.add_argument("--json", action="store_true", help="print the claims as one JSON document, not as a table")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Lists the experiments, or runs some, prints their claims and writes their report."""
    if arguments.list:
        rows = [[name, load(name).title, load(name).source] for name in NAMES]
        print(report.plain_table(["name", "what it shows", "from"], rows))
        return 0
    names = list(NAMES) if arguments.all else arguments.names
    plans = {name: _settings(arguments, name) for name in names}
    if not plans:
        raise ValueError(f"NAME: got none, wanted --all, --list or some of {', '.join(NAMES)}")
    if arguments.all and arguments.names:
        raise ValueError(f"--all: runs all of them, so {', '.join(arguments.names)} need no naming")
    if arguments.set and len(plans) > 1:
        raise ValueError(f"--set: changes a setting of one experiment, but {len(plans)} are to run")
    if arguments.resume:
        check_resume(arguments, any(runner.begun(arguments.output / name) for name in plans))
    arguments.when_interrupted = CAN_RESUME
    found, broken = [], 0
    total = sum(settings.seeds for settings in plans.values())
    with tqdm(total=total, unit="seed", disable=True if arguments.no_progress else None) as bar:

        def tick(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        for name, settings in plans.items():
            try:
                results = runner.run(name, arguments.preset, settings, arguments.output / name, arguments.resume, tick)
            except RuntimeError as error:  # all seeds of this one; the others go on
                print(f"sdfast reproduce: error: {error}", file=sys.stderr)
                broken += 1
                continue
            found.append(results)
            for seed, why in results["failures"].items():
                print(f"sdfast reproduce: warning: {name}: seed {seed} failed: {why}", file=sys.stderr)
                broken += 1
    if not found:
        return 1
    index = page.write(arguments.output)
    if arguments.json:
        print(json.dumps({results["experiment"]: results["claims"] for results in found}))
    else:
        for results in found:
            print(f"{results['title']}\n  {results['reading']}\n")
        print(report.plain_table(*page.claims_table(found)))
        print(f"\nreport: {index}")
    if (reason := plots.why_not()) is not None:
        print(f"sdfast reproduce: no pictures: {reason}", file=sys.stderr)
    return 1 if broken else 0


def _settings(arguments: argparse.Namespace, name: str) -> Any:
    settings = changed(load(name).presets[arguments.preset], arguments.set)  # first: what is asked for must suit them
    changes: dict[str, Any] = {}
    for option in ("seeds", "jobs"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option}: got {value}, wanted at least 1")
        if value is not None:
            changes[option] = value
    if arguments.device is not None and not hasattr(settings, "dataset"):
        if not arguments.all:
            raise ValueError(f"--device: {name} always runs on the CPU")
    elif arguments.device is not None:
        changes["device"] = arguments.device
    needs_files = getattr(settings, "dataset", None) in ("cifar10", "cifar100", "fashion_mnist")
    for option in ("data", "download"):
        value = getattr(arguments, option)
        if value and not needs_files and not arguments.all:
            raise ValueError(f"--{option}: {name} at preset {arguments.preset} reads no files")
        if value and needs_files:
            changes[option] = str(value) if option == "data" else value
    return replace(settings, **changes)
