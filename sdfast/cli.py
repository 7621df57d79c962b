"""The command ``sdfast``. A wrong argument is one line and exit code 2; Ctrl-C is one line and 130."""

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from sdfast import __version__

# name -> (module with add_arguments and run, what it does). A module is imported when its command is asked for.
COMMANDS = {
    "demo": (
        "sdfast.experiments.demo",
        "train on labels of which 40 % were redrawn at random, with and without self-distillation",
    ),
    "train": ("sdfast.train.command", "train a classifier on labels mixed with its own predictions"),
    "methods": ("sdfast.experiments.methods", "compare the published methods on the same noisy labels"),
    "rounds": ("sdfast.train.rounds_command", "train networks on one another's predictions, round after round"),
    "teacher": ("sdfast.train.teacher_command", "find the epoch at which a teacher teaches best"),
    "hilbert": ("sdfast.hilbert.command", "rounds of self-distillation on a kernel, and the one to stop at"),
    "ntk": ("sdfast.ntk.command", "the neural tangent kernel of a network on a data set, exact, and its spectrum"),
    "reproduce": ("sdfast.experiments.reproduce", "run the papers' figures and tables, and say what agrees"),
    "doctor": ("sdfast.doctor", "say what is installed, what runs where, and what to install for more"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: no ``None``, no ``False``."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit code: 0, 1 where the run failed, 2 where the arguments are wrong, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, options = "sdfast", None
    try:
        options = _parse(words)
        name = f"sdfast {options.command}"
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, name)
            return options.run(options)
    except KeyboardInterrupt:
        hint = "" if options is None else options.when_interrupted  # which a command may set once it has begun
        print(f"{name}: interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, NotImplementedError) as error:
        return _report(name, error, 2)
    except (OSError, FloatingPointError, RuntimeError, MemoryError, ImportError) as error:
        return _report(name, error, 1)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The options; `given` among them holds the names of those that the words themselves set."""
    parser, chosen = _parser(words)
    options = parser.parse_args(words)
    if chosen is not None:
        unset = object()
        chosen.set_defaults(**dict.fromkeys(vars(options), unset))
        again = vars(parser.parse_args(words))
        options.given = frozenset(option for option, value in again.items() if value is not unset)
    return options


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser | None]:
    """The parser, and that of the command the words name."""
    parser = _Parser(prog="sdfast", description="Learning from a model's own predictions.")
    parser.add_argument("--version", action="version", version=f"sdfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = None
    for command, (module_name, summary) in COMMANDS.items():
        subparser = commands.add_parser(
            command,
            help=summary.replace("%", "%%"),
            description=f"{summary[0].upper()}{summary[1:]}.",  # which argparse shows as it is
            formatter_class=_HelpFormatter,
        )
        if command == next((word for word in words if word in COMMANDS), None):
            module = importlib.import_module(module_name)
            subparser.set_defaults(run=module.run, when_interrupted="")
            module.add_arguments(subparser)
            chosen = subparser
    return parser, chosen


def _warn(name: str, message: Warning | str, *_: object, **__: object) -> None:
    print(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _report(name: str, error: Exception, code: int) -> int:
    print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
