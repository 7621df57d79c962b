"""The page of ``sdfast reproduce``: a section an experiment, the papers' numbers beside ours."""

import json
from pathlib import Path
from typing import Any

from sdfast import report
from sdfast.experiments.experiment import NAMES
from sdfast.experiments.runner import RESULTS


def write(folder: Path) -> Path:
    """Writes index.html from the results of every experiment in the folder.

    Args:
        folder: With a folder of results for each.

    Returns:
        The page's path.
    """
    found = [
        json.loads(path.read_text(encoding="utf-8")) for name in NAMES if (path := folder / name / RESULTS).exists()
    ]
    parts = [report.section("What this is about", *map(report.text, ABOUT))]
    parts += [report.section("The claims", report.table(*claims_table(found)), report.text(HOW_TESTED))]
    for results in found:
        parts.append(_section(results, folder / results["experiment"] / "curves.png"))
    versions = found[0]["environment"] if found else {}
    page = folder / "index.html"
    footer = ", ".join(f"{name} {value}" for name, value in versions.items())
    report.write_page(page, "Two papers on self-distillation, run again", parts, footer)
    return page


ABOUT = (
    "Part of the labels that a network is trained on are wrong here, on purpose: each training label is drawn anew "
    "over all classes with some probability, the noise, and may by chance stay what it was. A network trained long "
    "enough learns the wrong labels by heart and predicts new data worse: it overfits. Test data keep their right "
    "labels and are never trained on; accuracy is the share of them that is predicted right.",
    "Self-distillation lets a network learn from predictions of its own instead of the labels alone. Dong et al. 2019 "
    "mix every label with the network's present prediction, α parts label and 1 − α parts prediction, and trust the "
    "prediction more the better the network fits. Mobahi et al. 2020 train a network, then a fresh one on what the "
    "first predicts, and so on: each training is a round. A teacher is a network whose predictions another, the "
    "student, learns. An epoch is one pass over the training data, a seed one repetition with other random numbers: "
    "another split of the data, other noise, other initial weights. Cross entropy, used alone, is ordinary training on "
    "the labels; ℓ2 is the squared distance between predicted and wanted probabilities. The small preset has small "
    "networks on 1,797 pictures of handwritten digits: it shows whether a claim holds there, not whether a paper's "
    "numbers are right.",
    "Both papers explain this by a kernel, a matrix that says of every two samples how much learning one changes the "
    "prediction of the other; a network has one of its own, its tangent kernel. What lies along the kernel's top "
    "eigenvectors is learned first, and the rest, where noise has most of its weight, late or never. The information "
    "ratio of some labels is the share of their length that lies along the top few; the information gain is how much "
    "the ratio rises when labels are mixed with predictions. In Mobahi et al. a round may miss its labels by a "
    "tolerance ε, each round shrinks what lies along the weak eigenvectors further, and when nothing is left to fit "
    "within ε, the rounds have collapsed.",
)

HOW_TESTED = (
    "p is that of a one-sided sign-flip test over paired seeds: the share of ways to flip the signs of the seeds' "
    "differences that give at least the mean seen. A claim holds where p is at most .05. The presets were fixed "
    "before; no method was tuned on test data. Each claim is tested by itself, without a correction for their number. "
    "A claim that does not hold is left standing as such."
)


def claims_table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: a row a claim."""
    rows = []
    for results in found:
        for claim in results["claims"]:
            verdict = {True: "holds", False: "does not hold", None: "too few seeds"}[claim["holds"]]
            p = "" if claim["p"] is None else f"{claim['p']:.3g}"
            rows.append([f"{claim['text']} ({results['experiment']})", verdict, claim["size"], p, str(claim["seeds"])])
    return ["claim", "here", "size", "p", "seeds"], rows


def _tells(value: Any) -> bool:
    """Whether a setting says anything: a folder that is not there and a switch that is off do not."""
    return value is not None and value is not False


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(results: dict[str, Any], picture: Path) -> str:
    parts = [report.text(f"{results['question']} ({results['source']}.)")]
    if picture.exists():
        parts.append(report.picture(picture.read_bytes(), results["reading"]))
    parts.append(report.text(results["reading"]))
    for title, headers, rows in results["tables"]:
        parts.append(report.table(headers, rows, title))
    if results["unstated"]:
        parts.append(report.text(f"Not told by the paper: {results['unstated']}"))
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in results["settings"].items() if _tells(value))
    seconds = [values["seconds"] for values in results["seeds"].values() if "seconds" in values]
    took = f" {len(seconds)} seeds of {sum(seconds) / len(seconds):.0f} s on average." if seconds else ""
    parts.append(report.text(f"Preset {results['preset']}: {settings}.{took}"))
    for seed, why in results["failures"].items():
        parts.append(report.text(f"Seed {seed} failed: {why}"))
    return report.section(results["title"], *parts)
