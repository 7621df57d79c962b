"""``sdfast train``: the trainer from the command line, on a data set with label noise made on purpose."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from sdfast import _dispatch, _files, _locks, plots, report
from sdfast.baselines import METHODS, TwoNetworks, make_method
from sdfast.data import Dataset, NoisyLabels, evaluation_batches, training_batches
from sdfast.ops.self_distillation import AdaptiveAlpha
from sdfast.ops.self_distillation.arguments import is_no_op
from sdfast.ops.self_distillation.description import LOSSES
from sdfast.train.checkpoint import read
from sdfast.train.data_flags import (
    add_data_arguments,
    add_model_arguments,
    load_data,
    model_maker,
    noisy_labels,
)
from sdfast.train.flags import (
    CAN_RESUME,
    SETTINGS,
    check_arguments,
    check_resume,
    describe,
    method_options,
    named_as_flags,
    settings_of,
    take_settings,
)
from sdfast.train.history import History, strict_number
from sdfast.train.parts import AMP_DTYPES
from sdfast.train.self_distiller import SelfDistiller

LABEL_FUNCTIONS = ("hardmax", "softmax", "identity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_data_arguments(parser)

    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--method",
        choices=tuple(METHODS),
        help="a published method with a loss of its own, instead of the options below; co-teaching trains two networks",
    )
    loss.add_argument(
        "--option",
        nargs="+",
        metavar="NAME=VALUE",
        help="of the method, as sdfast.baselines names them",
    )
    alpha = loss.add_mutually_exclusive_group()
    alpha.add_argument(
        "--alpha-ratio",
        type=float,
        metavar="RATIO",
        help="1 - alpha = RATIO * batch accuracy, clipped to [0, 1]; without --alpha and --alpha-ratio it is 1.0",
    )
    alpha.add_argument("--alpha", type=float, help="constant weight of the given label; 1 is plain training")
    loss.add_argument("--label-fn", choices=LABEL_FUNCTIONS, default="hardmax", help="what a prediction becomes")
    loss.add_argument("--temperature", type=float, default=1.0, help="of the softmax")
    loss.add_argument("--loss", choices=tuple(LOSSES), default="cross_entropy", help="between logits and target")
    loss.add_argument("--label-smoothing", type=float, default=0.0, help="of the given label")
    loss.add_argument("--backend", choices=_dispatch.BACKENDS, help="of the loss; by default the best available")

    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        type=int,
        default=100,
        help="passes over the training data; --resume can make a run longer with --schedule constant only",
    )
    training.add_argument("--batch-size", type=int, default=128, help="rows in a step")
    training.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD")
    training.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    training.add_argument("--weight-decay", type=float, default=0.0, help="of SGD")
    training.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate")
    add_model_arguments(training)
    training.add_argument("--seed", type=int, default=0, help="of the split, the noise, the weights and the order")
    training.add_argument("--device", default="cpu", help="where to train")
    training.add_argument("--amp", choices=tuple(AMP_DTYPES), help="mixed precision")
    training.add_argument("--compile", action="store_true", help="train through torch.compile")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("sdfast-run"), help="folder of the run")
    output.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in that folder, with its settings",
    )
    output.add_argument("--json", action="store_true", help="print the summary as one JSON document, not as a table")
    output.add_argument("--no-progress", action="store_true", help="show no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Trains, prints the summary and fills the output folder."""
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output: {arguments.output} is a file, wanted a folder")
    checkpoint = arguments.output / "checkpoint.pt"
    # A run that failed in its first epoch has left a checkpoint of none, which stands in nobody's way.
    epochs_done = len(read(checkpoint)["history"]) if checkpoint.exists() else 0
    if epochs_done and not arguments.resume:
        raise ValueError(
            f"--output: {arguments.output} holds a run of {epochs_done} epochs; add --resume to continue it, or name "
            "another folder"
        )
    if arguments.resume:
        check_resume(arguments, (arguments.output / SETTINGS).exists() or checkpoint.exists())
        take_settings(arguments, epochs_done)
    check_arguments(arguments)
    with named_as_flags():
        data = load_data(arguments)
        noise = noisy_labels(arguments, data, arguments.seed)
        distiller = _distiller(arguments, data, noise)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with _locks.held(arguments.output, "sdfast train"):
        return _run(arguments, data, noise, distiller)


def _run(arguments: argparse.Namespace, data: Dataset, noise: NoisyLabels, distiller: SelfDistiller) -> int:
    settings = settings_of(arguments)
    _files.write_text(arguments.output / SETTINGS, json.dumps(settings, indent=1) + "\n")
    arguments.when_interrupted = CAN_RESUME
    _say_if_no_op(arguments)
    try:
        history = _fit(arguments, distiller, data, noise)
    except FloatingPointError as error:
        _write(arguments, settings, error.history)  # type: ignore[attr-defined]  # what led there is worth a look
        last = error.history.last  # type: ignore[attr-defined]
        raise FloatingPointError(
            f"the loss of epoch {last.epoch} is {last.loss}: lower --lr, which is {arguments.lr:g}; the epochs so far "
            f"are in {arguments.output / 'history.csv'}"
        ) from None
    _files.write_atomically(
        arguments.output / "model.pt", lambda file: torch.save(distiller.model.cpu().state_dict(), file)
    )
    _write(arguments, settings, history)
    _print_summary(arguments, settings, noise, history)
    return 0


def _fit(arguments: argparse.Namespace, distiller: SelfDistiller, data: Dataset, noise: NoisyLabels) -> History:
    seed, device = arguments.seed, distiller.device
    augment = not arguments.no_augment
    train = training_batches(data, noise.labels, arguments.batch_size, seed=seed, device=device, augment=augment)
    test = evaluation_batches(data, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="self_distillation_loss: with source=None")  # said by _say_if_no_op
        return distiller.fit(
            train,
            arguments.epochs,
            eval=test,
            checkpoint=arguments.output / "checkpoint.pt",
            progress=not arguments.no_progress,
            clean_labels=data.train_labels,
        )


def _say_if_no_op(arguments: argparse.Namespace) -> None:
    plain = arguments.method is not None or arguments.alpha == 1 or arguments.alpha_ratio == 0
    if not plain and is_no_op(arguments.label_fn, arguments.temperature, arguments.loss, False):
        print(
            f"sdfast train: warning: --label-fn {arguments.label_fn} with --loss {arguments.loss} is plain training at "
            "alpha times the learning rate: the model's own predictions teach it nothing; use --label-fn hardmax"
            + (" or a --temperature below 1" if arguments.label_fn == "softmax" else ""),
            file=sys.stderr,
        )


def _distiller(arguments: argparse.Namespace, data: Dataset, noise: NoisyLabels) -> SelfDistiller:
    method = None
    if arguments.method is not None:
        method = make_method(arguments.method, noise.labels, data.num_classes, **method_options(arguments))
    model = _model(arguments, data)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.lr, momentum=arguments.momentum, weight_decay=arguments.weight_decay
    )
    scheduler = None
    if arguments.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    return SelfDistiller(
        model,
        optimizer,
        **(_loss_options(arguments) if method is None else {"method": method}),
        scheduler=scheduler,
        device=arguments.device,
        amp=arguments.amp,
        compile=arguments.compile,
    )


def _model(arguments: argparse.Namespace, data: Dataset) -> torch.nn.Module:
    torch.manual_seed(arguments.seed)
    make = model_maker(arguments, data)
    return TwoNetworks(make(), make()) if arguments.method == "co-teaching" else make()


def _loss_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("label_fn", "temperature", "loss", "label_smoothing", "backend")
    alpha = AdaptiveAlpha(arguments.alpha_ratio) if arguments.alpha is None else arguments.alpha
    return {"alpha": alpha, **{name: getattr(arguments, name) for name in names}}


def _write(arguments: argparse.Namespace, settings: dict[str, Any], history: History) -> None:
    folder = arguments.output
    history.to_json(folder / "history.json")
    history.to_csv(folder / "history.csv")
    reason = plots.why_not()
    if reason is None:
        history.plot(folder / "curves.png", subtitle=describe(settings), eval_name="test")
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
