"""``--group NAME``: only that group, by its whole name (``-k 128x10`` would select 128x100 too)."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--group", action="append", default=[], help="run only this group of rows; may be repeated")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--group")
    if not wanted:
        return
    known = {item.callspec.params["group"] for item in items}
    if unknown := set(wanted) - known:
        raise pytest.UsageError(f"--group: got {sorted(unknown)}, wanted some of {sorted(known)}")
    items[:] = [item for item in items if item.callspec.params["group"] in wanted]
