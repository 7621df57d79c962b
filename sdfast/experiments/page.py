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
    "another split of the data, other noise, other initial weights. The small preset has small networks on 1,797 "
    "pictures of handwritten digits: it shows whether a claim holds there, not whether a paper's numbers are right.",
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


def _section(results: dict[str, Any], picture: Path) -> str:
    parts = [report.text(f"{results['question']} ({results['source']}.)")]
    if picture.exists():
        parts.append(report.picture(picture.read_bytes(), results["reading"]))
    parts.append(report.text(results["reading"]))
    for title, headers, rows in results["tables"]:
        parts += [report.text(title), report.table(headers, rows)]
    if results["unstated"]:
        parts.append(report.text(f"Not told by the paper: {results['unstated']}"))
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items() if value is not None)
    seconds = [values["seconds"] for values in results["seeds"].values() if "seconds" in values]
    took = f" {len(seconds)} seeds of {sum(seconds) / len(seconds):.0f} s on average." if seconds else ""
    parts.append(report.text(f"Preset {results['preset']}: {settings}.{took}"))
    for seed, why in results["failures"].items():
        parts.append(report.text(f"Seed {seed} failed: {why}"))
    return report.section(results["title"], *parts)
