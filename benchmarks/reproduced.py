"""The claims of the papers in a recorded run of `sdfast reproduce`: ``python -m benchmarks.reproduced FOLDER``.

Takes the folder that ``sdfast reproduce --all --output FOLDER`` filled, keeps what each experiment asked, found and
claimed under benchmarks/results/<device>/experiments/reproduced.json, and writes docs/reproduced.md from that.
"""

import argparse
import datetime
import json
from pathlib import Path

from benchmarks.environment import device_name
from sdfast import _files
from sdfast.experiments.experiment import NAMES

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "reproduced.md"
KEPT = ("experiment", "title", "source", "question", "reading", "preset", "claims", "failures")
VERDICTS = {True: "holds", False: "**does not hold**", None: "too few seeds"}
HEAD = """# What the papers claim, and what came out

Written by `python -m benchmarks.reproduced` from `{path}`, the record of
`{command}`
on {device} at {commit}, {date}: sdfast {sdfast}, torch {torch}, python {python}; {minutes:.1f} minutes.
{held} of {claims} claims held. Each is tested over paired seeds by a one-sided sign-flip test at 5 %; the settings were
fixed before, and none was tuned on the test data. [How to run it](papers.md).
"""


def recorded(folder: Path, about: dict) -> dict:
    """What is kept of a run: `about` and a part of every experiment's results.json."""
    experiments = [json.loads((folder / name / "results.json").read_text()) for name in NAMES]
    versions = {key: experiments[0]["environment"][key] for key in ("sdfast", "torch", "python")}
    return {**about, **versions, "experiments": [{key: found[key] for key in KEPT} for found in experiments]}


def page(run: dict, path: str) -> str:
    """The record as Markdown."""
    claims = [claim for found in run["experiments"] for claim in found["claims"]]
    parts = [HEAD.format(**run, path=path, claims=len(claims), held=sum(claim["holds"] is True for claim in claims))]
    for found in run["experiments"]:
        parts += [f"## {found['title']}", f"{found['source']}. {found['question']}", found["reading"]]
        rows = [
            f"| {claim['text']} | {VERDICTS[claim['holds']]} | {claim['size']} "
            f"| {'' if claim['p'] is None else format(claim['p'], '.2g')} | {claim['seeds']} |"
            for claim in found["claims"]
        ]
        parts.append("\n".join(["| claim | here | size | p | seeds |", "|---|---|---|---:|---:|", *rows]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Records a run and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, required=True, help="that the run took")
    parser.add_argument("--commit", required=True, help="that it ran at")
    parser.add_argument("--command", default="sdfast reproduce --all --preset small", help="that was run")
    arguments = parser.parse_args()
    about = {"command": arguments.command, "commit": arguments.commit, "minutes": arguments.minutes}
    about |= {"device": device_name(), "date": datetime.date.today().isoformat()}
    path = RESULTS / device_name() / "experiments" / "reproduced.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run = recorded(arguments.folder, about)
    _files.write_text(path, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    _files.write_text(PAGE, page(run, str(path.relative_to(RESULTS.parent.parent))))


if __name__ == "__main__":
    main()
