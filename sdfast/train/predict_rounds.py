"""``sdfast rounds --predict``: how many rounds help, from a trained network's kernel and the noisy labels alone."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdfast import _devices, hilbert, ntk
from sdfast.hilbert import command
from sdfast.models.state import load_state
from sdfast.train.data_flags import check_noise, load_data, model_maker, noisy_labels
from sdfast.train.flags import named_as_flags

USED = ("predict", "tolerance", "samples", "rounds", "dataset", "data", "download", "test_fraction", "noise",
        "noise_kind", "noise_convention", "noise_transition", "noise_exact", "model", "hidden", "seed", "device",
        "output", "json", "no_progress", "command")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the prediction."""
    group = parser.add_argument_group("prediction")
    group.add_argument(
        "--predict", type=Path, metavar="FILE", help="train nothing: predict from the kernel of --model with this state"
    )
    group.add_argument("--tolerance", type=float, default=0.05, help="of each fit, as a share of the label energy")
    group.add_argument("--samples", type=int, default=1000, help="how many training samples, from the first")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table of rounds on the network's kernel, and the round where GCV stops.

    Raises:
        ValueError: A flag is impossible, or one of the training that does not take place.
    """
    _check_arguments(arguments)
    with named_as_flags():
        data = load_data(arguments)
        given = noisy_labels(arguments, data, arguments.seed).labels
        make = model_maker(arguments, data)
    arguments.output.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    samples = min(arguments.samples, len(data.train_inputs))
    device = _devices.usable(arguments.device)
    model = load_state(make(), arguments.predict, "--predict").eval().to(device, torch.float64)
    train, test = (inputs.to(device, torch.float64) for inputs in (data.train_inputs[:samples], data.test_inputs))
    progress = not arguments.no_progress and sys.stderr.isatty()
    gram, cross = (ntk.gram(model, *pair, outputs="mean", progress=progress) for pair in ((train,), (test, train)))
    problem = _problem(given[:samples], data.train_labels[:samples], data.test_labels, data.num_classes)
    path = hilbert.self_distill(
        gram.cpu().numpy(), problem.targets, relative_tolerance=arguments.tolerance,
        rounds=arguments.rounds if "rounds" in arguments.given else None,
    )  # fmt: skip
    command.check_feasible(path, arguments.tolerance)
    arguments.kernel = "neural tangent"
    results = command.examine(arguments, problem, path, path.best_round(), cross.cpu().numpy())
    print(json.dumps(results) if arguments.json else command.describe(results))
    command.write_output(arguments.output, results, path)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name in sorted(arguments.given - set(USED)):
        raise ValueError(f"--{name.replace('_', '-')}: says how networks are trained, but --predict trains none")
    if not arguments.predict.is_file():
        raise ValueError(f"--predict: there is no file {arguments.predict}")
    if not 0 < arguments.tolerance < 1:
        raise ValueError(f"--tolerance: got {arguments.tolerance}, wanted between 0 and 1")
    if arguments.samples < 2:
        raise ValueError(f"--samples: got {arguments.samples}, wanted at least 2")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")
    check_noise(arguments)


def _problem(given: Tensor, clean: Tensor, truth: Tensor, classes: int) -> command.Data:
    """The labels as `sdfast hilbert` has them; the inputs are the kernel's business."""
    targets = np.eye(classes)[given.numpy()]
    offset = targets.mean(0)
    nothing = np.empty((len(given), 0))
    return command.Data(
        nothing, nothing, targets - offset, offset, given.numpy(), clean.numpy(), truth.numpy(), classes
    )
