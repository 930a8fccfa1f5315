"""The README's table of scripts and its two commands are true."""

import re
import subprocess

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_lines_and_changed_lines_are_those_of_the_files():
    rows = re.findall(r"^\| \[(expo_\w+)\.py\]\(\1\.py\) \|[^|]*\|[^|]*\| (\d+) \| (\d+|-) \|", README, re.M)
    assert [row[0] for row in rows] == ["expo_diffusion", "expo_flow", "expo_finetune"]
    for script, lines, changed in rows:
        assert int(lines) == len((ROOT / f"{script}.py").read_text().splitlines())
        command = ["diff", str(ROOT / "expo_diffusion.py"), str(ROOT / f"{script}.py")]
        diff = subprocess.run(command, capture_output=True, text=True).stdout
        count = sum(line.startswith(("<", ">")) for line in diff.splitlines())
        assert changed == (str(count) if count else "-")


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert commands[0].endswith("python expo_diffusion.py") and commands[1].endswith("python -m pytest")
    pattern = re.search(r"grep -m 1 '([^']+)' README.md", (ROOT / ".ci" / "run").read_text())
    assert pattern and [c for c in commands if re.search(pattern[1], c)] == [commands[1]]


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []
