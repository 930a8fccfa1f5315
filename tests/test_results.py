"""The tables in the docs are what benchmark/plot.py makes of the CSVs in the repository."""

import re

import pytest
from conftest import ROOT

from benchmark import plot

PAGES = {path: path.read_text() for path in (ROOT / "docs").glob("*.md")}
# Each is a comment <!-- table: GRID TASK --> before a table.
TABLES = [
    (p.name, *m) for p, text in PAGES.items() for m in re.findall(r"<!-- table: (\w+) (\S+) -->\n\n((?:\|.*\n)+)", text)
]


@pytest.mark.parametrize("page, grid, task, table", TABLES, ids=[" ".join(found[:3]) for found in TABLES])
def test_a_table_is_that_of_the_csvs(page, grid, task, table, capsys):
    plot.main((ROOT / "benchmark" / "results" / grid,))
    printed = re.search(rf"\n{task}, eval/\w+\n\n((?:\|.*\n)+)", capsys.readouterr().out)
    assert printed and table == printed[1]


def test_times_are_those_of_the_csvs(capsys):
    """The rows of the table "Time to 90 %"."""
    rows = re.findall(r"^\| (.+) \|$", PAGES[ROOT / "docs" / "benchmark.md"].partition("## Time to 90 %")[2], re.M)
    for row in rows[1:]:
        results, task, method, seeds, steps, seconds, commit, _ = row.split(" | ")
        plot.main((ROOT / "benchmark" / "results" / results,), methods=(method,))
        printed = capsys.readouterr().out
        found = re.search(rf"\n{task}, eval/\w+\n(?:\n\|.*){{2}}\n\| {method} \|(.*) \|\n", printed)
        cells = found[1].split(" | ") if found else []
        assert [cells[0].strip(), *cells[6:8]] == [seeds, steps, seconds] and printed.startswith(f"commits: {commit} (")
    assert len(rows) > 3


def test_there_are_tables():
    assert len(TABLES) >= 1 and sum(table.count("|") for *_, table in TABLES) > 30
