"""The command line: what it writes, and that wrong arguments are one line and exit code 2."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

import sdfast
from sdfast.cli import main
from sdfast.train import History


def run(capfd, *words):
    """(exit code, stdout, stderr) of ``sdfast words``, in this process."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capfd.readouterr()
    return code, out, err


def train(capfd, output, *words):
    return run(capfd, "train", "--output", output, "--epochs", 2, "--hidden", 16, "--noise", 0.4, *words)


def test_train_fills_its_folder_and_prints_a_table(capfd, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = train(capfd, tmp_path / "run")
    assert (code, err) == (0, "")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint.pt", "history.json", "history.csv", "settings.json", "curves.png", "model.pt"}
    history = History.from_json(tmp_path / "run" / "history.json")
    assert history["epoch"] == [1, 2]
    assert None not in history["clean_accuracy"] + history["eval_accuracy"]
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == history["loss"]
    assert f"{100 * history.last.eval_accuracy:.1f}" in out
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["noise"] == 0.4


def test_train_prints_one_json_document(capfd, tmp_path):
    code, out, _ = train(capfd, tmp_path / "run", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["last_epoch"] == History.from_json(tmp_path / "run" / "history.json").last._asdict()
    assert 0.3 < document["realised_noise"] < 0.42


def test_a_longer_run_resumes_and_equals_one_without_a_break(capfd, tmp_path):
    constant = ("--schedule", "constant")
    assert train(capfd, tmp_path / "a", *constant)[0] == 0
    assert train(capfd, tmp_path / "a", *constant, "--resume", "--epochs", 4)[0] == 0
    assert train(capfd, tmp_path / "b", *constant, "--epochs", 4)[0] == 0
    first, second = (torch.load(tmp_path / name / "checkpoint.pt")["parts"]["model"] for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "words",
    [
        ("--alpha", 1.0),
        ("--alpha", 0.5, "--label-fn", "softmax", "--temperature", 0.5, "--loss", "kl"),
        ("--alpha-ratio", 0.5, "--label-smoothing", 0.1, "--backend", "reference"),
        ("--alpha", 1.5, "--loss", "mse", "--lr", 0.05, "--momentum", 0, "--weight-decay", 0.001),
        ("--noise-convention", "others", "--noise-exact", "--amp", "bfloat16", "--test-fraction", 0.5),
        ("--noise-kind", "pair", "--schedule", "constant", "--batch-size", 32, "--seed", 5, "--hidden"),
    ],
)
def test_every_option_trains(words, capfd, tmp_path):
    code, _, err = train(capfd, tmp_path / "run", *words)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("separator", [" ", ","])
def test_asymmetric_noise_reads_its_matrix(separator, capfd, tmp_path):
    matrix = torch.eye(10).roll(1, dims=1).tolist()
    (tmp_path / "matrix").write_text("\n".join(separator.join(map(str, row)) for row in matrix))
    words = ("--noise-kind", "asymmetric", "--noise-transition", tmp_path / "matrix", "--json")
    code, out, _ = train(capfd, tmp_path / "run", *words)
    assert code == 0
    assert 0.35 < json.loads(out)["realised_noise"] < 0.45


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: command"),
        (("paint",), "argument command: invalid choice: 'paint'"),
        (("train", "--colour", "red"), "unrecognized arguments: --colour red"),
        (("train", "--epochs", "many"), "argument --epochs: invalid int value: 'many'"),
        (("train", "--epochs", 0), "--epochs: got 0, wanted at least 1"),
        (("train", "--batch-size", -3), "--batch-size: got -3, wanted at least 1"),
        (("train", "--noise", 1.5), "--noise: got 1.5, wanted within [0, 1]"),
        (("train", "--noise", "nan"), "--noise: got nan, wanted within [0, 1]"),
        (("train", "--lr", 1e308), "--lr: got 1e+308, wanted at most 3.4e+38, the largest float32"),
        (("train", "--weight-decay", 1e40), "--weight-decay: got 1e+40, wanted at most 3.4e+38"),
        (("train", "--loss", "mse", "--alpha", 1e308), "--alpha: got 1e+308, wanted at most 3.4e+38"),
        (("train", "--hidden", 10**20), "--hidden: got 100000000000000000000, wanted widths of at most 65536"),
        (("train", "--device", "meta"), "--device: got 'meta', which torch cannot compute on here"),
        (("demo", "--picture", "no/such/folder.png"), "--picture: there is no folder no/such"),
        (("train", "--lr", -1), "--lr: got -1.0, wanted a finite number >= 0"),
        (("train", "--weight-decay", "inf"), "--weight-decay: got inf, wanted a finite number >= 0"),
        (("train", "--hidden", 0), "--hidden: got [0], wanted widths of at least 1"),
        (("train", "--alpha", 2), "--alpha: got 2.0, wanted within [0, 1]"),
        (("train", "--alpha", 1, "--alpha-ratio", 1), "argument --alpha-ratio: not allowed with argument --alpha"),
        (("train", "--alpha-ratio", -1), "--alpha-ratio: got -1.0, wanted a finite number >= 0"),
        (("train", "--temperature", 2), "--temperature: got 2.0, but only --label-fn softmax has one, not hardmax"),
        (("train", "--label-fn", "softmax", "--temperature", 0), "--temperature: got 0.0, wanted a "),
        (
            ("train", "--label-fn", "identity"),
            "--label-fn: identity gives no probabilities and goes with --loss mse only",
        ),
        (("train", "--dataset", "mnist"), "argument --dataset: invalid choice: 'mnist'"),
        (("train", "--test-fraction", 1), "--test-fraction: got 1.0, wanted a number in (0, 1)"),
        (("train", "--test-fraction", 0.9999), "--test-fraction: got 0.9999, which leaves no row of 1797 for training"),
        (("train", "--backend", "cuda"), "--backend cuda: serves CUDA tensors, not cpu"),
        (("train", "--seed", -1), "--seed: got -1, wanted an integer in"),
        (("train", "--device", "abacus"), "--device: got 'abacus', which torch cannot compute on here"),
        (("train", "--amp", "float16"), "--amp: got 'float16' on the CPU"),
        (
            ("train", "--noise-kind", "asymmetric"),
            "--noise-transition: --noise-kind asymmetric wants a file with its matrix",
        ),
        (
            ("train", "--noise", 0.1, "--noise-kind", "asymmetric", "--noise-transition", "no/such/file"),
            "--noise-transition: there is no file no/such/file",
        ),
        (
            ("train", "--noise", 0.1, "--noise-convention", "others", "--noise-kind", "pair"),
            "--noise-convention: only --noise-kind symmetric has one, not pair",
        ),
        (("train", "--noise-convention", "others"), "--noise-convention: says how labels are changed, but without"),
        (("train", "--noise-exact"), "--noise-exact: says how labels are changed, but without --noise none is"),
        (("train", "--noise-transition", "m"), "--noise-transition: only --noise-kind asymmetric takes one, not sym"),
        (("demo", "--seeds", 0), "--seeds: got 0, wanted at least 1"),
        (("demo", "--epochs", -1), "--epochs: got -1, wanted at least 1"),
        (("doctor", "--jason"), "unrecognized arguments: --jason"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(words, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capfd, *words)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("sdfast")
    assert f"error: {message}" in err
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_that_holds_a_run_is_not_overwritten(capfd, tmp_path):
    train(capfd, tmp_path / "run")
    before = contents(tmp_path / "run")
    code, _, err = train(capfd, tmp_path / "run")
    assert code == 2
    assert "holds a run of 2 epochs; add --resume to continue it, or name another folder" in err
    code, _, err = train(capfd, tmp_path / "run", "--resume", "--lr", 0.01, "--noise", 0.2, "--alpha", 0.5)
    assert code == 2
    assert "noise was 0.4 and is 0.2; --alpha was not given and is 0.5; --lr was 0.1 and is 0.01; leave them out" in err
    assert err.count("\n") == 1
    code, _, err = train(capfd, tmp_path / "run", "--resume", "--epochs", 4)
    assert code == 2
    assert "--epochs was 2 and is 4; the cosine schedule ends with the epochs it was made for" in err
    assert "_" not in err.replace(str(tmp_path), "")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("words", [("train",), ("rounds",), ("teacher",), ("reproduce", "theorem1")])
def test_there_must_be_something_to_resume(words, capfd, tmp_path):
    """A mistyped folder does not start a run by default settings."""
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        code, out, err = run(capfd, *words, "--resume", "--output", tmp_path / name, "--no-progress")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"--resume: {tmp_path / name} holds nothing to continue, wanted the folder of a run" in err
    assert [(path.name, list(path.iterdir())) for path in tmp_path.iterdir()] == [("empty", [])]


def test_a_bare_resume_takes_the_settings_of_the_run(capfd, tmp_path):
    words = ("--schedule", "constant", "--alpha", 0.7, "--seed", 3, "--batch-size", 64)
    train(capfd, tmp_path / "run", *words)
    code, _, err = run(capfd, "train", "--resume", "--output", tmp_path / "run", "--epochs", 4)
    assert (code, err) == (0, "")
    code, _, err = run(capfd, "train", "--resume", "--output", tmp_path / "run")  # 4 epochs are its settings now
    assert (code, err) == (0, "")
    train(capfd, tmp_path / "whole", *words, "--epochs", 4)
    first, second = (torch.load(tmp_path / name / "model.pt") for name in ("run", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("run", "whole")]
    assert settings[0] == settings[1]
    code, _, err = run(capfd, "train", "--resume", "--output", tmp_path / "run", "--epochs", 3)
    assert code == 2
    assert "--epochs: got 3, but the run in" in err
    (tmp_path / "run" / "settings.json").write_text("{")
    code, _, err = run(capfd, "train", "--resume", "--output", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "settings.json is no readable JSON" in err


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_run_that_failed_in_its_first_epoch_does_not_lock_its_folder(resume, capfd, tmp_path):
    assert train(capfd, tmp_path / "run", "--lr", 1e6, "--loss", "mse")[0] == 1
    code, _, err = train(capfd, tmp_path / "run", "--lr", 0.05, "--loss", "kl", *resume)
    assert (code, err) == (0, "")
    train(capfd, tmp_path / "fresh", "--lr", 0.05, "--loss", "kl")
    first, second = (torch.load(tmp_path / name / "model.pt") for name in ("run", "fresh"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_settings_name_the_alpha_that_ran(capfd, tmp_path):
    _, out, _ = train(capfd, tmp_path / "run", "--json")
    for settings in (json.loads(out)["settings"], json.loads((tmp_path / "run" / "settings.json").read_text())):
        assert (settings["alpha_ratio"], settings["alpha"]) == (1.0, None)
    _, out, _ = train(capfd, tmp_path / "constant", "--json", "--alpha", 0.5)
    settings = json.loads(out)["settings"]
    assert (settings["alpha_ratio"], settings["alpha"]) == (None, 0.5)


def test_a_damaged_checkpoint_is_one_line(capfd, tmp_path):
    train(capfd, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"\x80\x02 nothing")
    for words in ((), ("--resume",)):
        code, _, err = train(capfd, tmp_path / "run", *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "checkpoint.pt is no readable checkpoint" in err


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (("--label-fn", "softmax"), True),
        (("--label-fn", "softmax", "--loss", "kl", "--alpha", 0.5), True),
        (("--label-fn", "identity", "--loss", "mse", "--lr", 0.01), True),
        (("--label-fn", "softmax", "--alpha", 1), False),
        (("--label-fn", "softmax", "--temperature", 0.5), False),
        (("--label-fn", "softmax", "--loss", "mse"), False),
    ],
)
def test_a_self_term_without_effect_is_one_line_that_names_flags(words, warns, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("sdfast.ops.self_distillation.arguments._warned", False)
    code, _, err = train(capfd, tmp_path / "run", *words)
    assert code == 0
    assert err.count("\n") == warns
    assert err.startswith(f"sdfast train: warning: --label-fn {words[1]} with --loss " if warns else "")


def test_a_warning_is_one_line(capfd, monkeypatch):
    monkeypatch.setattr("sdfast.doctor.run", lambda options: warnings.warn("something\nslow", stacklevel=1) or 0)
    assert run(capfd, "doctor") == (0, "", "sdfast doctor: warning: something slow\n")


def test_the_trained_model_is_loaded_as_the_page_says(capfd, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    lines = re.search(r"^    model = .*\n    model\.load_state_dict\(.*model\.pt.*$", page, re.M).group()
    lines = textwrap.dedent(lines)
    monkeypatch.chdir(tmp_path)
    folder = re.search(r'"([^"]+)/model\.pt"', lines).group(1)
    run(capfd, "train", "--epochs", 2, "--output", folder)
    names = {"sdfast": sdfast, "torch": torch}
    exec(lines, names)
    digits = sdfast.data.load_dataset("digits")
    accuracy = (names["model"](digits.test_inputs).argmax(-1) == digits.test_labels).double().mean()
    assert float(accuracy) == History.from_json(tmp_path / folder / "history.json").last.eval_accuracy


def test_a_matrix_of_words_is_refused(capfd, tmp_path):
    (tmp_path / "matrix").write_text("not a number\n")
    words = ("--noise-kind", "asymmetric", "--noise-transition", tmp_path / "matrix")
    code, _, err = train(capfd, tmp_path / "run", *words)
    assert code == 2
    assert err.startswith("sdfast train: error: --noise-transition: ")
    assert err.count("\n") == 1


def test_an_empty_matrix_is_refused(capfd, tmp_path):
    (tmp_path / "matrix").write_text("\n")
    words = ("--noise-kind", "asymmetric", "--noise-transition", tmp_path / "matrix")
    code, _, err = train(capfd, tmp_path / "run", *words)
    assert (code, err) == (2, f"sdfast train: error: --noise-transition: {tmp_path / 'matrix'}: is empty\n")


def test_a_second_run_in_the_same_folder_is_refused(capfd, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    held = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    code, _, err = train(capfd, tmp_path / "run")
    os.close(held)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--output: another sdfast train is at work in {tmp_path / 'run'}" in err
    assert train(capfd, tmp_path / "run")[0] == 0


def test_an_error_of_torch_in_training_is_one_line(capfd, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("sdfast.train.self_distiller.SelfDistiller.fit", fail)
    code, _, err = train(capfd, tmp_path / "run")
    assert (code, err) == (1, "sdfast train: error: out of memory\n")


def test_an_output_that_is_a_file_is_refused(capfd, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, _, err = train(capfd, tmp_path / "run")
    assert code == 2
    assert "is a file, wanted a folder" in err


def test_a_training_that_diverges_fails_with_one_line_and_keeps_its_history(capfd, tmp_path):
    code, _, err = train(capfd, tmp_path / "run", "--lr", 1e6, "--loss", "mse")
    assert code == 1
    assert "the loss of epoch 1 is " in err
    assert "lower --lr, which is 1e+06" in err
    assert "allow_nan" not in err
    assert err.count("\n") == 1
    assert len(History.from_json(tmp_path / "run" / "history.json")) == 1


def test_no_matplotlib_is_said_and_all_else_is_written(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("sdfast.plots.why_not", lambda: "matplotlib is not installed: pip install matplotlib")
    code, _, err = train(capfd, tmp_path / "run")
    assert code == 0
    assert err == "sdfast train: no picture: matplotlib is not installed: pip install matplotlib\n"
    assert (tmp_path / "run" / "history.json").exists()


def test_version_and_help(capfd):
    assert run(capfd, "--version") == (0, f"sdfast {sdfast.__version__}\n", "")
    code, out, _ = run(capfd, "--help")
    assert code == 0
    assert all(command in out for command in ("demo", "train", "doctor"))
    code, out, _ = run(capfd, "train", "--help")
    assert code == 0
    assert "--alpha-ratio" in out
    assert "(default: None)" not in out
    code, out, _ = run(capfd, "demo", "--help")
    assert "40 % were redrawn" in out
    assert "%%" not in out


def test_ctrl_c_is_one_line_and_exit_code_130(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sdfast",
        "train",
        "--epochs",
        "1000000",
        "--hidden",
        "8",
        "--output",
        tmp_path / "run",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "sdfast train: interrupted; the same command with --resume continues\n"


def test_train_by_a_method(capfd, tmp_path):
    code, out, _ = train(capfd, tmp_path / "run", "--method", "elr", "--option", "strength=3", "momentum=0.7", "--json")
    assert code == 0
    assert json.loads(out)["settings"]["method"] == "elr"
    code, _, err = train(capfd, tmp_path / "run", "--resume", "--method", "gce")
    assert code == 2
    assert "--method was elr and is gce" in err
    code, out, _ = train(capfd, tmp_path / "pair", "--method", "co-teaching", "--option", "forget_rate=0.3")
    assert code == 0
    names = torch.load(tmp_path / "pair" / "model.pt", weights_only=True)
    assert {name.split(".")[0] for name in names} == {"first", "second"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "elr", "--alpha", 0.5], "--alpha: got 0.5, but --method elr has a loss of its own"),
        (["--method", "gce", "--label-fn", "softmax"], "--label-fn: got softmax, but --method gce"),
        (["--option", "q=1"], "--option: q=1 is of a method, and there is no --method"),
        (
            ["--method", "gce", "--option", "p=1"],
            "--option: got p=1, wanted NAME=VALUE with --method gce, NAME one of q",
        ),
        (["--method", "gce", "--option", "q"], "--option: got q, wanted NAME=VALUE"),
        (["--method", "gce", "--option", "q=high"], "--option: got q=high, wanted a number after the ="),
        (["--method", "gce", "--option", "q=7"], "q: got 7, wanted a number in (0, 1]"),
        (["--method", "co-teaching"], "--option: --method co-teaching wants forget_rate=VALUE, which has no default"),
        (["--method", "cross-entropy", "--option", "a=1"], "NAME none: it has no options"),
    ],
)
def test_train_refuses_a_method_in_one_line(capfd, tmp_path, words, message):
    code, _, err = train(capfd, tmp_path / "run", *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
