"""The flags that the training commands share: data and its noise, the network, and how it is trained."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sdfast.data import Dataset, NoisyLabels, dataset_names, flip_labels, load_dataset
from sdfast.models.registry import MODELS, flat_mlp, model_builder
from sdfast.train.parts import AMP_DTYPES
from sdfast.train.recipe import SCHEDULES, Recipe


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data, and how much of its labels is made wrong."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=dataset_names(), default="digits", help="what to learn")
    data.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of cifar10, cifar100, fashion_mnist, or your own"
    )
    data.add_argument("--download", action="store_true", help="let torchvision fetch what is not in that folder")
    data.add_argument(
        "--test-fraction", type=float, help="share held out for testing where it is drawn (default: 0.25)"
    )
    data.add_argument("--no-augment", action="store_true", help="do not shift and mirror uint8 pictures")
    data.add_argument("--noise", type=float, default=0.0, help="probability with which a training label is chosen")
    data.add_argument(
        "--noise-kind",
        choices=("symmetric", "asymmetric", "pair"),
        default="symmetric",
        help="what it becomes",
    )
    data.add_argument(
        "--noise-convention",
        choices=("all", "others"),
        default="all",
        help="symmetric: drawn from which classes",
    )
    data.add_argument(
        "--noise-transition", type=Path, metavar="FILE", help="asymmetric: a text file of C lines of C probabilities"
    )
    data.add_argument("--noise-exact", action="store_true", help="choose exactly that share of the labels")


def load_data(arguments: argparse.Namespace) -> Dataset:
    """The data set that the flags name.

    Raises:
        ValueError: There is none, or a flag does not go with it.
    """
    data = load_dataset(
        arguments.dataset,
        test_fraction=arguments.test_fraction,
        seed=arguments.seed,
        folder=arguments.data,
        download=arguments.download,
    )
    if arguments.no_augment and data.train_inputs.dtype is not torch.uint8:
        raise ValueError(f"--no-augment: {arguments.dataset} holds no uint8 pictures, which alone are augmented")
    return data


def noisy_labels(arguments: argparse.Namespace, data: Dataset, seed: int) -> NoisyLabels:
    """Its training labels with the noise that the flags name."""
    transition = None
    if arguments.noise_transition is not None:
        if not arguments.noise_transition.is_file():
            raise ValueError(f"--noise-transition: there is no file {arguments.noise_transition}")
        try:
            text = arguments.noise_transition.read_text(encoding="utf-8")
            if not text.strip():
                raise ValueError("is empty")
            delimiter = "," if "," in text.partition("\n")[0] else None
            matrix = np.loadtxt(text.splitlines(), delimiter=delimiter, ndmin=2)
        except ValueError as error:
            raise ValueError(f"--noise-transition: {arguments.noise_transition}: {error}") from None
        transition = torch.from_numpy(matrix)
    return flip_labels(
        data.train_labels,
        arguments.noise,
        data.num_classes,
        arguments.noise_kind,
        convention=arguments.noise_convention,
        transition=transition,
        exact=arguments.noise_exact,
        generator=torch.Generator().manual_seed(seed),
    )


def check_noise(arguments: argparse.Namespace) -> None:
    """Refuses noise flags that do not go together, or without noise.

    Raises:
        ValueError: They do not; the message names the flag.
    """
    if not 0 <= arguments.noise <= 1:
        raise ValueError(f"--noise: got {arguments.noise}, wanted within [0, 1]")
    kind = arguments.noise_kind
    if kind == "asymmetric" and arguments.noise_transition is None:
        raise ValueError("--noise-transition: --noise-kind asymmetric wants a file with its matrix")
    if kind != "asymmetric" and arguments.noise_transition is not None:
        raise ValueError(f"--noise-transition: only --noise-kind asymmetric takes one, not {kind}")
    if kind != "symmetric" and arguments.noise_convention != "all":
        raise ValueError(f"--noise-convention: only --noise-kind symmetric has one, not {kind}")
    if arguments.noise == 0:
        told = {"kind": kind != "symmetric", "convention": arguments.noise_convention != "all"}
        told["exact"] = arguments.noise_exact
        for name, is_told in told.items():
            if is_told:
                raise ValueError(f"--noise-{name}: says how labels are changed, but without --noise none is")


def add_model_arguments(group: argparse._ArgumentGroup, role: str = "") -> None:
    """The network, or that of a role such as ``"teacher"``."""
    prefix = f"{role}-" if role else ""
    group.add_argument(
        f"--{prefix}model", default="mlp", help=f"module:function of your own, or {', '.join(sorted(MODELS))}"
    )
    group.add_argument(
        f"--{prefix}hidden", type=int, nargs="*", default=[256, 256], help="mlp: widths of the hidden layers"
    )


def model_maker(arguments: argparse.Namespace, data: Dataset, role: str = "") -> Callable[[], nn.Module]:
    """A function that makes the network that the flags name.

    Raises:
        ValueError: There is none, or its flags do not go together.
    """
    prefix = f"{role}_" if role else ""
    name, hidden = getattr(arguments, f"{prefix}model"), getattr(arguments, f"{prefix}hidden")
    shape = tuple(data.train_inputs.shape[1:])
    if name == "mlp":
        return lambda: flat_mlp(shape, hidden, data.num_classes)
    if f"{prefix}hidden" in arguments.given:
        flag = prefix.replace("_", "-")
        raise ValueError(f"--{flag}hidden: are widths of --{flag}model mlp, not of {name}")
    build = model_builder(name)
    return lambda: build(shape, data.num_classes)


def add_recipe_arguments(group: argparse._ArgumentGroup, epochs: int = 100) -> None:
    """How each network is trained."""
    group.add_argument("--epochs", type=int, default=epochs, help="of each network")
    group.add_argument("--batch-size", type=int, default=128, help="rows in a step")
    group.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD")
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of SGD")
    group.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    group.add_argument("--seed", type=int, default=0, help="of the split, the noise, the weights and the order")
    group.add_argument("--device", default="cpu", help="where to train")
    group.add_argument("--amp", choices=tuple(AMP_DTYPES), help="mixed precision")
    group.add_argument("--compile", action="store_true", help="train through torch.compile")


def recipe_of(arguments: argparse.Namespace, **changes: object) -> Recipe:
    """The recipe that the flags name, with changes."""
    values = {
        "epochs": arguments.epochs, "batch_size": arguments.batch_size, "learning_rate": arguments.lr,
        "momentum": arguments.momentum, "weight_decay": arguments.weight_decay, "schedule": arguments.schedule,
        "augment": not arguments.no_augment, "device": arguments.device, "amp": arguments.amp,
        "compile": arguments.compile,
    }  # fmt: skip
    return Recipe(**{**values, **changes})
