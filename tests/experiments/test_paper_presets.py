"""The paper presets on tiny data in the real formats: they start, train, are killed, and go on where they were."""

from dataclasses import replace

import pytest
from disk_formats import write_cifar

from sdfast.experiments import runner
from sdfast.experiments.experiment import NAMES, load
from sdfast.train import SelfDistiller

# Fewer epochs, and networks of the same family that a CPU trains in seconds.
SHORT = {
    "dong2019_figure1": {
        "epochs": (1, 2), "early": 1, "student_epochs": 1, "teacher_model": "wide_resnet28_1",
        "teacher_schedule": "constant",
    },
    "dong2019_figure2": {"epochs": 2, "model": "resnet20", "samples": 12, "pairs": 2, "repeats": 2},
    "dong2019_figure4": {"epochs": 2},
    "dong2019_figure5": {"iterations": 4, "every": 2, "model": "resnet20", "samples": 6, "pairs": 2},
    "rounds_predicted": {"rounds": 2, "epochs": 1, "model": "resnet20", "rows": 10},
    "dong2019_table1": {
        "epochs": 2, "noises": (0.0, 0.4), "ratios": (1.0, 1.0), "methods": ("co-teaching", "elr", "self-distillation"),
        "model": "resnet20",
    },
    "mobahi2020_figure3": {"rounds": 2, "epochs": 1, "model": "resnet20"},
    "appendix_early_stopping": {"rounds": 2, "epochs": 2, "model": "resnet20"},
}  # fmt: skip
KILLED_AT = {
    "dong2019_figure1": 2, "dong2019_figure2": 2, "dong2019_figure4": 3, "dong2019_figure5": 2, "dong2019_table1": 4,
    "rounds_predicted": 3, "mobahi2020_figure3": 2, "appendix_early_stopping": 3,
}  # fmt: skip


def run(name, folder, data):
    settings = replace(load(name).presets["paper"], seeds=1, data=str(data), batch_size=32, **SHORT[name])
    return runner.run(name, "paper", settings, folder, True, lambda _: None)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_paper_preset_is_killed_and_goes_on(name, tmp_path, monkeypatch, torchvision_datasets):
    classes = 100 if load(name).presets["paper"].dataset == "cifar100" else 10
    write_cifar(tmp_path / "data", monkeypatch, torchvision_datasets, classes)
    whole = run(name, tmp_path / "whole", tmp_path / "data")["seeds"]["0"]
    train, calls = SelfDistiller._train_epoch, 0

    def killed(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == KILLED_AT[name]:
            raise KeyboardInterrupt
        return train(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SelfDistiller, "_train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(name, tmp_path / "run", tmp_path / "data")
    assert any((tmp_path / "run").glob("seed-0/**/*.pt"))  # something to go on from
    resumed = run(name, tmp_path / "run", tmp_path / "data")["seeds"]["0"]
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


def test_every_experiment_with_data_has_such_a_test():
    with_data = {name for name in NAMES if hasattr(load(name).presets["paper"], "dataset")}
    assert with_data == set(SHORT)
