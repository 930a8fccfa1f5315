"""The tables in the docs are what benchmark/plot.py makes of the CSVs in the repository."""

import json
import re

import pytest
from conftest import ROOT

from benchmark import plot

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
# Each is a comment <!-- table: GRID TASK --> or <!-- table: GRID TASK less METHOD --> before a table.
TABLES = [
    (p.name, *found)
    for p, text in PAGES.items()
    for found in re.findall(r"<!-- table: (\w+) (\S+) (?:less (\w+) )?-->\n\n((?:\|.*\n)+)", text)
]
# Each is a comment <!-- finals: GRID GRID --> before a table of the column "final", with one column a task.
FINALS = [
    (p.name, *m) for p, text in PAGES.items() for m in re.findall(r"<!-- finals: ([\w ]+) -->\n\n((?:\|.*\n)+)", text)
]


@pytest.mark.parametrize("page, grid, task, less, table", TABLES, ids=[" ".join(found[:4]) for found in TABLES])
def test_a_table_is_that_of_the_csvs(page, grid, task, less, table, capsys):
    plot.main((ROOT / "benchmark" / "results" / grid,), less=less)
    after = capsys.readouterr().out.partition(f"\n{task}, eval/")[2]
    assert table == re.findall(r"(?:^\|.*\n)+", after, re.M)[1 if less else 0]


@pytest.mark.parametrize("page, grids, table", FINALS, ids=[" ".join(found[:2]) for found in FINALS])
def test_a_table_of_tasks_is_that_of_the_csvs(page, grids, table, capsys):
    plot.main(tuple(ROOT / "benchmark" / "results" / grid for grid in grids.split()))
    printed = dict(re.findall(r"\n(\S+), eval/\w+\n\n((?:\|.*\n)+)", capsys.readouterr().out))
    (_, *tasks), _, *rows = ([cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines())
    for method, *cells in rows:
        for task, cell in zip(tasks, cells, strict=True):
            found = re.search(rf"^\| {method} \| \d+ \| (.*?) \|", printed[task], re.M)
            assert cell in ((found[1], found[1].split()[0]) if found else ("-",)), f"{method}, {task}"


def test_times_are_those_of_the_csvs(capsys):
    """The rows of the table "Time to 90 %"."""
    rows = re.findall(r"^\| (.+) \|$", PAGES[ROOT / "docs" / "benchmark.md"].partition("## Time to 90 %")[2], re.M)
    for row in rows[1:]:
        results, task, method, seeds, steps, seconds, commit, _ = row.split(" | ")
        plot.main((ROOT / "benchmark" / "results" / results,), methods=(method,))
        printed = capsys.readouterr().out
        found = re.search(rf"\n{task}, eval/\w+\n(?:\n\|.*){{2}}\n\| {method} \|(.*) \|\n", printed)
        cells = found[1].split(" | ") if found else []
        assert [cells[0].strip(), *cells[6:8]] == [seeds, steps, seconds]
        records = (ROOT / "benchmark" / "results" / results / task / method).glob("*/args.json")
        assert {json.loads(path.read_text())["starts"][0]["commit"] for path in records} == {commit}
    assert len(rows) > 3


def test_there_are_tables():
    assert len(TABLES) >= 1 and sum(table.count("|") for *_, table in TABLES) > 30
