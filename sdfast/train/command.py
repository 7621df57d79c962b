"""``sdfast train``: the trainer from the command line, on a data set with label noise made on purpose."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdfast import _dispatch, _files, plots, report
from sdfast.data import DATASETS, Batches, Dataset, NoisyLabels, flip_labels, load_dataset
from sdfast.models import mlp
from sdfast.ops.self_distillation import AdaptiveAlpha
from sdfast.ops.self_distillation.description import LOSSES
from sdfast.train.history import History, strict_number
from sdfast.train.self_distiller import AMP_DTYPES, SelfDistiller

LABEL_FUNCTIONS = ("hardmax", "softmax", "identity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.set_defaults(when_interrupted="; the same command with --resume continues")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=sorted(DATASETS), default="digits", help="what to learn")
    data.add_argument("--test-fraction", type=float, default=0.25, help="share held out for testing")
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

    loss = parser.add_argument_group("loss")
    alpha = loss.add_mutually_exclusive_group()
    alpha.add_argument(
        "--alpha-ratio", type=float, metavar="RATIO", help="1 - alpha = RATIO * batch accuracy (1.0 without --alpha)"
    )
    alpha.add_argument("--alpha", type=float, help="constant weight of the given label; 1 is plain training")
    loss.add_argument("--label-fn", choices=LABEL_FUNCTIONS, default="hardmax", help="what a prediction becomes")
    loss.add_argument("--temperature", type=float, default=1.0, help="of the softmax")
    loss.add_argument("--loss", choices=tuple(LOSSES), default="cross_entropy", help="between logits and target")
    loss.add_argument("--label-smoothing", type=float, default=0.0, help="of the given label")
    loss.add_argument("--backend", choices=_dispatch.BACKENDS, help="of the loss; by default the best available")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=100, help="passes over the training data")
    training.add_argument("--batch-size", type=int, default=128, help="rows in a step")
    training.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD")
    training.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    training.add_argument("--weight-decay", type=float, default=0.0, help="of SGD")
    training.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate")
    training.add_argument("--hidden", type=int, nargs="*", default=[256, 256], help="widths of the hidden layers")
    training.add_argument("--seed", type=int, default=0, help="of the split, the noise, the weights and the order")
    training.add_argument("--device", default="cpu", help="where to train")
    training.add_argument("--amp", choices=tuple(AMP_DTYPES), help="mixed precision")
    training.add_argument("--compile", action="store_true", help="train through torch.compile")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("sdfast-run"), help="folder of the run")
    output.add_argument("--resume", action="store_true", help="continue the run in that folder, if there is one")
    output.add_argument("--json", action="store_true", help="print the summary as one JSON document, not as a table")
    output.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Trains, prints the summary and fills the output folder."""
    _check_arguments(arguments)
    checkpoint = arguments.output / "checkpoint.pt"
    if checkpoint.exists() and not arguments.resume:
        raise ValueError(f"--output: {arguments.output} holds a run; add --resume to continue it or name another")
    data = load_dataset(arguments.dataset, test_fraction=arguments.test_fraction, seed=arguments.seed)
    noise = _noisy_labels(arguments, data)
    distiller = _distiller(arguments, data)
    seed, device = arguments.seed, distiller.device
    train = Batches(data.train_inputs, noise.labels, arguments.batch_size, seed=seed, device=device, with_indices=True)
    test = Batches(data.test_inputs, data.test_labels, 4096, shuffle=False, device=device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = _settings(arguments)
    if not checkpoint.exists():
        _files.write_text(arguments.output / "settings.json", json.dumps(settings, indent=1) + "\n")
    try:
        history = distiller.fit(
            train,
            arguments.epochs,
            eval=test,
            checkpoint=checkpoint,
            progress=not arguments.no_progress,
            clean_labels=data.train_labels,
        )
    except FloatingPointError as error:
        _write(arguments.output, settings, error.history)  # type: ignore[attr-defined]  # what led there is worth a look
        raise
    _write(arguments.output, settings, history)
    _print_summary(arguments, settings, noise, history)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what the parts below would refuse in words that are not the command's."""
    for name in ("epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(arguments, name)}, wanted at least 1")
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(arguments, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted a finite number >= 0")
    for name in ("noise", "alpha", "label_smoothing"):
        value = getattr(arguments, name)
        unbounded = name == "alpha" and arguments.loss == "mse"
        if value is not None and not unbounded and not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, wanted within [0, 1]")
    if any(width < 1 for width in arguments.hidden):
        raise ValueError(f"--hidden: got {arguments.hidden}, wanted widths of at least 1")
    if arguments.noise_kind == "asymmetric" and arguments.noise_transition is None:
        raise ValueError("--noise-transition: asymmetric noise wants a file with its matrix")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")


def _noisy_labels(arguments: argparse.Namespace, data: Dataset) -> NoisyLabels:
    transition = None
    if arguments.noise_transition is not None:
        if not arguments.noise_transition.is_file():
            raise ValueError(f"--noise-transition: there is no file {arguments.noise_transition}")
        try:
            matrix = np.loadtxt(arguments.noise_transition, delimiter=_delimiter(arguments.noise_transition), ndmin=2)
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
        generator=torch.Generator().manual_seed(arguments.seed),
    )


def _delimiter(path: Path) -> str | None:
    return "," if "," in path.read_text(encoding="utf-8").partition("\n")[0] else None


def _distiller(arguments: argparse.Namespace, data: Dataset) -> SelfDistiller:
    torch.manual_seed(arguments.seed)
    model = mlp((data.train_inputs[0].numel(), *arguments.hidden, data.num_classes))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.lr, momentum=arguments.momentum, weight_decay=arguments.weight_decay
    )
    scheduler = None
    if arguments.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    alpha: float | AdaptiveAlpha = arguments.alpha
    if alpha is None:
        alpha = AdaptiveAlpha(1.0 if arguments.alpha_ratio is None else arguments.alpha_ratio)
    return SelfDistiller(
        model,
        optimizer,
        alpha=alpha,
        label_fn=arguments.label_fn,
        temperature=arguments.temperature,
        loss=arguments.loss,
        label_smoothing=arguments.label_smoothing,
        backend=arguments.backend,
        scheduler=scheduler,
        device=arguments.device,
        amp=arguments.amp,
        compile=arguments.compile,
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the result, as they were given."""
    rest = ("command", "run", "when_interrupted", "output", "resume", "json", "no_progress")
    values = {name: value for name, value in vars(arguments).items() if name not in rest}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _write(folder: Path, settings: dict[str, Any], history: History) -> None:
    history.to_json(folder / "history.json")
    history.to_csv(folder / "history.csv")
    reason = plots.why_not()
    if reason is None:
        history.plot(folder / "curves.png")
    else:
        print(f"sdfast train: no picture: {reason}", file=sys.stderr)


def _print_summary(
    arguments: argparse.Namespace, settings: dict[str, Any], noise: NoisyLabels, history: History
) -> None:
    if arguments.json:
        epochs = {name: {k: strict_number(v) for k, v in record._asdict().items()} for name, record in _epochs(history)}
        document = {
            "settings": settings,
            "realised_noise": noise.realised_rate,
            **{f"{name}_epoch": record for name, record in epochs.items()},
            "seconds": sum(history["seconds"]),
            "output": str(arguments.output),
        }
        print(json.dumps(document, allow_nan=False))
        return
    headers = ["", "epoch", "loss", "train, as given (%)", "train, true (%)", "test (%)", "alpha"]
    rows = []
    for name, record in _epochs(history):
        accuracies = (record.accuracy, record.clean_accuracy, record.eval_accuracy)
        shown = [f"{100 * value:.1f}" if value is not None else "" for value in accuracies]
        rows.append([name, record.epoch, f"{record.loss:.4f}", *shown, f"{record.alpha:.3f}"])
    print(report.plain_table(headers, rows))
    print(f"\nwrong labels: {100 * noise.realised_rate:.1f} %   time: {sum(history['seconds']):.1f} s")
    print(f"output: {arguments.output}")


def _epochs(history: History) -> list[tuple[str, Any]]:
    return [("last", history.last), ("best", history.best)]
