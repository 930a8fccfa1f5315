"""Copied into another project, without utils/: each script trains, logs, evaluates, saves and resumes there.

The environment there has observations of float64, as most of MuJoCo's.
"""

import difflib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EVERY_SCRIPT, ROOT, flags_of
from running import SMALL, read_metrics, values_of

DATA = """    rng, shapes = np.random.default_rng(0), ((200, 4), (200, 1), 200, (200, 4))
    data = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes] + [np.zeros(200, np.float32)]
"""
# Starts each command line twice: a run of half the steps, then its continuation.
DRIVER = """
import importlib.util, json, runpy, sys
assert importlib.util.find_spec("utils") is None
for words in json.loads(sys.argv[1]):
    for more in (["--total-timesteps", "25"], ["--resume", words[words.index("--run-dir") + 1]]):
        sys.argv = [*words, *more]
        runpy.run_path(words[0], run_name="__main__")
"""
FLAGS: dict[str, Any] = {**SMALL, "task": "", "env_id": "InvertedPendulum-v5", "save_model": True}
FLAGS |= {"total_timesteps": 50, "offline_steps": 5, "eval_every": 25, "log_every": 5}
FLAGS |= {"checkpoint_every": 1, "learning_starts": 0}


def pasted(source: str) -> str:
    """The script as someone changes it for a project of their own."""
    for old, new in (
        (r"(?m)^from utils\.data .*\n", "import tyro\n"),
        (r"(?m)^from utils\..*\n", ""),
        (r"(?m)^    env_flags = .*\n", ""),
        (r"make_env\(\*env_flags", 'gym.make("InvertedPendulum-v5", max_episode_steps=12'),
        (r"(?m)^    data = load_dataset.*\n", DATA),
        (r"parse_args\(Args, __doc__\)", "tyro.cli(Args)"),
    ):
        source, count = re.subn(old, new, source)
        assert count, old
    return source


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with all scripts, and their runs, ended and resumed."""
    folder, commands = tmp_path_factory.mktemp("project"), []
    for name in EVERY_SCRIPT:
        path = folder / f"{name.split('.')[-1]}.py"
        path.write_text(pasted((ROOT / f"{name.replace('.', '/')}.py").read_text()))
        words = flags_of(importlib.import_module(name), {**FLAGS, "run_dir": folder / "runs" / name})
        commands.append([str(path), *words])
    command = [sys.executable, "-I", "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_a_pasted_script_trains_and_goes_on(name, project):
    before = (ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()
    after = (project / f"{name.split('.')[-1]}.py").read_text().splitlines()
    changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    touched = sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in changes if kind != "equal")
    assert touched <= 12  # lines that a user changes
    run_dir = project / "runs" / name
    rows, state = read_metrics(run_dir), torch.load(run_dir / "checkpoint.pt")
    assert [step for step in values_of(rows, "eval/return") if step >= 0] == [0, 25, 50]
    assert [step for step in values_of(rows, "losses/critic") if step > 0] == list(range(5, 51, 5))
    assert state["step"] == len(state["rows"][0]) == 50
    assert len(json.loads((run_dir / "args.json").read_text())["starts"]) == 2
    assert torch.load(run_dir / "agent.pt")["obs_dim"] == 4 and list(run_dir.glob("events.out.*"))
