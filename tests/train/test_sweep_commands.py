"""``sdfast rounds`` and ``sdfast teacher``: their folders, their resume, and one's own data and networks."""

import json

import numpy as np
import pytest

from sdfast.cli import main

COMMON = ("--epochs", "2", "--hidden", "8", "--runs", "2", "--noise", "0.4", "--no-progress")
ROUNDS = ("rounds", "--rounds", "2", *COMMON)
TEACHER = ("teacher", "--teacher-epochs", "1", "3", "--teacher-hidden", "8", *COMMON)


def call(capsys, *words):
    code = main([str(word) for word in words])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize("words", [ROUNDS, TEACHER], ids=["rounds", "teacher"])
def test_a_sweep_fills_its_folder_and_resumes(words, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    code, out, err = call(capsys, *words, "--output", folder)
    assert (code, err) == (0, "")
    assert {"results.json", "curves.png", "index.html", "runs"} == {path.name for path in folder.iterdir()}
    results = json.loads((folder / "results.json").read_text())
    assert len(results["runs"]) == 2
    assert results["failures"] == {}
    assert "of the labels wrong" in out
    code, _, err = call(capsys, *words, "--output", folder)
    assert code == 2
    assert "holds runs; add --resume" in err
    code, out, _ = call(capsys, *words, "--output", folder, "--resume", "--json")
    assert code == 0
    assert json.loads(out)["runs"] == results["runs"]  # the times too: nothing ran again
    code, _, err = call(capsys, *words, "--output", folder, "--resume", "--lr", 0.2)
    assert code == 2
    assert err.startswith(f"sdfast {words[0]}: error: --output: ")
    assert "belongs to a run with other settings" in err


def test_the_table_holds_the_means(tmp_path, capsys):
    _, out, _ = call(capsys, *ROUNDS, "--output", tmp_path / "run")
    runs = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    values = [run[1]["test_accuracy"] for run in runs]
    row = next(line for line in out.splitlines() if line.startswith("2 "))
    assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" in row


def test_ones_own_data_and_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[-1] ** 2, num_classes))\n"
    )
    labels = np.arange(40) % 2
    pixels = np.random.default_rng(0).integers(0, 90, (40, 1, 8, 8)) + 120 * labels[:, None, None, None]
    (tmp_path / "mine").mkdir()
    np.savez(tmp_path / "mine" / "all.npz", inputs=pixels.astype(np.uint8), labels=labels)
    data = ("--dataset", "folder", "--data", tmp_path / "mine", "--model", "own_networks:net", "--runs", 1)
    words = [word for word in COMMON[4:] if word != "2"][1:]
    assert call(capsys, "rounds", *data, "--epochs", 3, "--rounds", 2, *words, "--output", tmp_path / "r")[0] == 0
    teacher = ("--teacher-model", "own_networks:net", "--teacher-epochs", 2)
    assert call(capsys, "teacher", *data, *teacher, "--epochs", 3, *words, "--output", tmp_path / "t")[0] == 0
    student = json.loads((tmp_path / "t" / "results.json").read_text())["runs"][0][0]["student_accuracy"]
    assert student > 0.8


def write_pictures(folder, formats=("png", "jpg"), classes=("dark", "light"), each=8):
    """A folder of real files for each class, told apart by their brightness; in turn of each format."""
    images = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng()
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            pixels = (rng.integers(0, 90, (8, 8, 3)) + 150 * number).astype(np.uint8)
            images.fromarray(pixels).save(folder / name / f"{index}.{formats[index % len(formats)]}")


@pytest.mark.usefixtures("torchvision_datasets")
def test_ones_own_pictures(tmp_path, capsys, monkeypatch):
    """PNG and JPEG files in a folder a class, in parts and to be split, through both commands and one's own network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_pictures.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    assert (input_shape, num_classes) == ((3, 8, 8), 2)\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n"
    )
    write_pictures(tmp_path / "one", each=20)
    for part in ("train", "test"):
        write_pictures(tmp_path / "two" / part)
    data = ("--dataset", "folder", "--model", "own_pictures:net")
    words = (*data, "--runs", 1, "--epochs", 60, "--lr", 0.5, "--no-progress")
    for name in ("one", "two"):
        results = []
        for command in (("rounds", "--rounds", 2), ("teacher", "--teacher-model", "small_cnn", "--teacher-epochs", 1)):
            folder = tmp_path / f"{command[0]}-{name}"
            code, out, err = call(capsys, *command, *words, "--data", tmp_path / name, "--output", folder)
            assert (code, err) == (0, "")
            assert out.startswith(f"{name}, labels as they are")
            results.append(json.loads((folder / "results.json").read_text()))
        assert results[0]["runs"][0][0]["test_accuracy"] > 0.8  # brightness tells the classes apart
        assert results[1]["alone"][0] > 0.8


def spoil(folder, how):
    images = pytest.importorskip("PIL.Image")
    if how == "one class":
        return write_pictures(folder, classes=("only",))
    if how != "empty":
        write_pictures(folder)
    if how == "empty class":
        (folder / "nothing").mkdir()
    elif how == "sizes":
        images.fromarray(np.zeros((5, 8, 3), np.uint8)).save(folder / "light" / "9.png")
    elif how == "text":
        (folder / "light" / "9.png").write_text("no picture")
    elif how == "cut":
        path = folder / "dark" / "1.jpg"
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "cut png":
        path = folder / "dark" / "0.png"
        path.write_bytes(path.read_bytes()[:60])
    return folder.mkdir(exist_ok=True)


@pytest.mark.usefixtures("torchvision_datasets")
@pytest.mark.parametrize("command", ["rounds", "teacher", "train"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("empty", "holds no .npz file and no folders of pictures"),
        ("one class", "has one class, wanted at least two"),
        ("empty class", "Found no valid file for the classes nothing"),
        ("sizes", "9.png has (5, 8, 3) pixels, the first (8, 8, 3); make all of one size"),
        ("text", "9.png is no readable picture: "),
        ("cut", "1.jpg is no readable picture: "),
        ("cut png", "0.png is no readable picture: "),
    ],
)
def test_bad_folders(command, how, said, tmp_path, capsys):
    spoil(tmp_path / "mine", how)
    words = ("--dataset", "folder", "--data", tmp_path / "mine", "--output", tmp_path / "run", "--no-progress")
    code, out, err = call(capsys, command, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"sdfast {command}: error: --data: {tmp_path / 'mine'}")
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rounds", "--rounds", 0), "--rounds: got 0"),
        (("rounds", "--runs", 0), "--runs: got 0"),
        (("rounds", "--epochs", 0), "--epochs: got 0"),
        (("rounds", "--lr", -1), "--lr: got -1.0"),
        (("rounds", "--noise", 2), "--noise: got 2.0"),
        (("rounds", "--model", "nothing"), "--model: got 'nothing'"),
        (("rounds", "--model", "resnet20"), "--model: resnet20 got inputs (64,)"),
        (("rounds", "--device", "nowhere"), "--device: got 'nowhere'"),
        (("teacher", "--teacher-epochs", 3, 2), "--teacher-epochs: got [3, 2], wanted increasing"),
        (("teacher", "--temperature", 0), "--temperature: got 0.0"),
        (("teacher", "--teacher-model", "small_cnn", "--teacher-hidden", 4), "--teacher-hidden: are widths of"),
    ],
)
def test_bad_flags(words, said, tmp_path, capsys):
    code, out, err = call(capsys, *words, "--output", tmp_path / "run", "--no-progress")
    assert code == 2
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
