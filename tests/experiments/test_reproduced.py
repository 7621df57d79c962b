"""The page of a recorded run says what the record says."""

import json
from pathlib import Path

from benchmarks import reproduced


def test_the_page_is_of_its_record():
    text = reproduced.PAGE.read_text(encoding="utf-8")
    path = next(part for part in text.split("`") if part.endswith("reproduced.json"))
    run = json.loads((Path(reproduced.__file__).parent.parent / path).read_text(encoding="utf-8"))
    assert reproduced.page(run, path) == text


def test_a_verdict_of_too_few_seeds_is_none(tmp_path):
    claim = {"text": "a", "size": "1", "p": None, "seeds": 2}
    found = {"title": "t", "source": "s", "question": "q", "reading": "r"}
    run = {
        "command": "c",
        "device": "d",
        "commit": "x",
        "date": "1",
        "sdfast": "0",
        "torch": "2",
        "python": "3",
        "minutes": 1.0,
    }
    for holds, held in ((True, 1), (False, 0), (None, 0)):
        page = reproduced.page({**run, "experiments": [{**found, "claims": [{**claim, "holds": holds}]}]}, "p")
        assert f"{held} of 1 claims held" in page
        assert reproduced.VERDICTS[holds] in page
