"""The tables in the docs are what benchmark/plot.py makes of the CSVs in the repository."""

import contextlib
import functools
import io
import json
import re

import pytest
from conftest import ROOT

from benchmark import plot

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
# Each is a comment <!-- table: GRID TASK --> before a table.
TABLES = [
    (p.name, *found)
    for p, text in PAGES.items()
    for found in re.findall(r"<!-- table: (\w+) (\S+) -->\n\n((?:\|.*\n)+)", text)
]
# Each is a comment <!-- finals: GRID GRID --> before a table of the column "final", with one column a task.
FINALS = [
    (p.name, *m) for p, text in PAGES.items() for m in re.findall(r"<!-- finals: ([\w ]+) -->\n\n((?:\|.*\n)+)", text)
]


@functools.cache
def printed(*grids: str) -> str:
    """What benchmark/plot.py prints of grids."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plot.main(tuple(ROOT / "benchmark" / "results" / grid for grid in grids))
    return out.getvalue()


def table_of(grid: str, task: str) -> str:
    """The table of one task: all methods."""
    after = printed(grid).partition(f"\n{task}, eval/")[2]
    return re.findall(r"(?:^\|.*\n)+", after, re.M)[0]


@pytest.mark.parametrize("page, grid, task, table", TABLES, ids=[" ".join(found[:3]) for found in TABLES])
def test_a_table_is_that_of_the_csvs(page, grid, task, table):
    assert table == table_of(grid, task)


@pytest.mark.parametrize("page, grids, table", FINALS, ids=[" ".join(found[:2]) for found in FINALS])
def test_a_table_of_tasks_is_that_of_the_csvs(page, grids, table):
    by_task = dict(re.findall(r"\n(\S+), eval/\w+\n\n((?:\|.*\n)+)", printed(*grids.split())))
    (_, *tasks), _, *rows = ([cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines())
    for method, *cells in rows:
        for task, cell in zip(tasks, cells, strict=True):
            found = re.search(rf"^\| {method} \| \d+ \| (.*?) \|", by_task[task], re.M)
            assert cell in ((found[1], found[1].split()[0]) if found else ("-",)), f"{method}, {task}"


def test_times_are_those_of_the_csvs():
    """The rows of the table "Time to 90 %"."""
    rows = re.findall(r"^\| (.+) \|$", PAGES[ROOT / "docs" / "benchmark.md"].partition("## Time to 90 %")[2], re.M)
    for row in rows[1:]:
        results, task, method, seeds, steps, seconds, commit, _ = row.split(" | ")
        found = re.search(rf"^\| {method} \|(.*) \|$", table_of(results, task), re.M)
        cells = found[1].split(" | ") if found else []
        assert [cells[0].strip(), *cells[6:8]] == [seeds, steps, seconds]
        records = (ROOT / "benchmark" / "results" / results / task / method).glob("*/args.json")
        assert {json.loads(path.read_text())["starts"][0]["commit"] for path in records} == {commit}
    assert len(rows) > 3


def test_there_are_tables():
    assert len(TABLES) >= 1 and sum(table.count("|") for *_, table in TABLES) > 30
