"""README and docs are true: counted lines, links, commands (the cheap ones are run), and tables of results."""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from benchmark import plot
from utils.tasks import TASKS

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def commands(page: str) -> list[str]:
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines()) if line]


OWN = {"record.py", "train_my_policy.py", "finetune_my_policy.py"}  # programs that a page shows
COMMANDS = sorted({line for page in PAGES for line in commands(page)})


def start(command: str, cwd) -> str:
    _, script, *words = shlex.split(command)
    return subprocess.check_output([sys.executable, ROOT / script, *words], cwd=cwd, text=True)


def test_lines_and_changed_lines_are_those_of_the_files():
    rows = re.findall(r"^\| \[(expo_\w+)\.py\]\(\1\.py\) \|[^|]*\|[^|]*\| (\d+) \| (\d+|-) \|", README, re.M)
    assert [row[0] for row in rows] == ["expo_diffusion", "expo_flow", "expo_finetune"]
    for script, lines, changed in rows:
        assert int(lines) == len((ROOT / f"{script}.py").read_text().splitlines())
        command = ["diff", "expo_diffusion.py", f"{script}.py"]
        diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        count = sum(line.startswith(("<", ">")) for line in diff.splitlines())
        assert changed == (str(count) if count else "-")


def test_ci_runs_the_test_command_of_the_readme():
    whole = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [line.rpartition("/")[2] for line in whole] == ["python expo_diffusion.py", "python -m pytest"]
    pattern = re.findall(r"grep -m 1 '([^']+)' README.md", (ROOT / ".ci" / "run").read_text())[0]
    assert [line for line in whole if re.search(pattern, line)] == [whole[1]]


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = folder / path if path else folder / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w\- ]", "", h).replace(" ", "-").lower() for h in headings], link


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_flags_and_tasks_of_a_command_exist(command):
    """A flag exists if the script, or the script behind a program of benchmark or tools, has a field of that name."""
    for part in command.split("&&"):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py") and "/test_" not in word and word not in OWN]
        source = "".join((ROOT / script).read_text() for script in scripts)
        runs_another = words[1:] and words[1].startswith(("benchmark/", "tools/cuda_graph"))
        source += (ROOT / "expo_finetune.py").read_text() if runs_another else ""
        flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", part)} - {"help"}
        if scripts:
            assert [flag for flag in flags if not re.search(rf"\b{flag}\b", source)] == []
            assert all(words[i + 1] in TASKS for i, word in enumerate(words) if word == "--task")
        assert all((ROOT / word).exists() for word in words if word.endswith((".toml", ".txt")) or "/test_" in word)


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.search("--help|--dry-run|data.py list", line)])
def test_a_cheap_command_works_as_written(command):
    assert start(command, ROOT)


def test_a_task_of_ones_own_works_as_its_page_says(tmp_path, monkeypatch):
    """The numbers of `inspect` are those of the page; the run is shorter."""
    page = "your_own_task.md"
    _, look, train, *_ = commands(page)
    run_page(page, ["my_task.py", "record.py"], tmp_path, monkeypatch)
    for words in (look, look.replace("npz", "hdf5")):
        assert start(words, tmp_path).split()[1:] == blocks(page, "text")[0].split()[1:]
    assert "done: runs" in start(f"{train} --offline-steps 2 --total-timesteps 2 --eval-episodes 1", tmp_path)


def test_a_policy_of_ones_own_works_as_its_page_says(tmp_path, monkeypatch):
    """With a shorter training. Imitation goes on online, or the policy is frozen: then no weight of it changes."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (requirements-dev.txt)")
    page, small = "your_own_policy.md", "--offline-steps 2 --total-timesteps 2 --eval-episodes 1 --save-model --run-dir"
    names = ["my_policy.py", "finetune_my_policy.py", "train_my_policy.py"]
    run_page(page, names, tmp_path, monkeypatch, ("3_000", "3"))
    before = torch.load(tmp_path / "my_policy" / "agent.pt")["agent"]
    for place, command in enumerate(commands(page)[2:]):
        words = shlex.split(command)[1:] + f"{small} {place}".split()
        subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
        after = torch.load(tmp_path / str(place) / "agent.pt")["agent"]
        assert all(torch.equal(after[key], before[key]) for key in before) == (place == 1)


def run_page(page: str, names: list[str], folder, monkeypatch, change: tuple[str, str] = ("", "")) -> None:
    """Writes the programs of a page in its order, and runs the one that is named last."""
    for name, text in zip(sorted(names, key=PAGES[page].index), blocks(page, "python"), strict=True):
        (folder / name).write_text(text.replace(*change))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    subprocess.run([sys.executable, names[-1]], cwd=folder, check=True)


# Each is a comment <!-- table: GRID TASK --> before a table; behind TASK may stand: until STEP.
TABLES = [
    (page, *found)
    for page, text in PAGES.items()
    for found in re.findall(r"<!-- table: (\w+) (\S+)(?: until (\d+))? -->\n\n((?:\|.*\n)+)", text)
]
# Each is a comment <!-- finals: GRID GRID --> before a table of the column "final", with one column a task.
FINALS = [
    (page, *m) for page, text in PAGES.items() for m in re.findall(r"<!-- finals: ([\w ]+) -->\n\n((?:\|.*\n)+)", text)
]


@functools.cache
def printed(*grids: str, until: str = "") -> str:
    """What benchmark/plot.py prints of grids."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        plot.main(tuple(ROOT / "benchmark" / "results" / grid for grid in grids), until=float(until or "inf"))
    return out.getvalue()


def table_of(grid: str, task: str, until: str = "") -> str:
    """The table of one task: all methods."""
    after = printed(grid, until=until).partition(f"\n{task}, eval/")[2]
    return re.findall(r"(?:^\|.*\n)+", after, re.M)[0]


@pytest.mark.parametrize("page, grid, task, until, table", TABLES, ids=[" ".join(found[:3]) for found in TABLES])
def test_a_table_is_that_of_the_csvs(page, grid, task, until, table):
    assert table == table_of(grid, task, until)


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
    rows = re.findall(r"^\| (.+) \|$", PAGES["benchmark.md"].partition("## Time to 90 %")[2], re.M)
    for row in rows[1:]:
        results, task, method, seeds, steps, seconds, commit, _ = row.split(" | ")
        found = re.search(rf"^\| {method} \|(.*) \|$", table_of(results, task), re.M)
        cells = found[1].split(" | ") if found else []
        assert [cells[0].strip(), *cells[6:8]] == [seeds, steps, seconds]
        records = (ROOT / "benchmark" / "results" / results / task / method).glob("*/args.json")
        assert {json.loads(path.read_text())["starts"][0]["commit"] for path in records} == {commit}
    assert len(rows) > 3


def test_there_are_tables():
    assert len(TABLES) == sum(text.count("<!-- table:") for text in PAGES.values()) > 5
    assert {page for page, *_ in FINALS} == {"README.md", "results.md"}
