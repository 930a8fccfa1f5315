"""Copied into another project, without utils/: each script trains, logs, evaluates, saves and resumes there."""

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
from conftest import EVERY_SCRIPT, ROOT, TINY_RUN, flags_of
from running import read_metrics, values_of

DATA = """    rng, shapes = np.random.default_rng(0), ((200, 3), (200, 1), 200, (200, 3))
    data = [rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes] + [np.zeros(200, np.float32)]
"""
# Starts each command line twice, in forks: the first one dies before its fourth rename, the second one goes on.
DRIVER = """
import importlib.util, json, os, runpy, signal, sys
import gymnasium, torch, tyro, torch.utils.tensorboard.writer
assert importlib.util.find_spec("utils") is None
torch.optim.Adam([torch.zeros(1)])  # imports what every fork needs

def start(words, left):
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    def trapped(*names, replace=os.replace):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
    os.replace, sys.argv = trapped, words
    runpy.run_path(words[0], run_name="__main__")
    os._exit(0)

for words in json.loads(sys.argv[1]):
    codes = [start(words, 4), start([*words, "--resume", words[words.index("--run-dir") + 1]], -1)]
    assert codes == [-9, 0], (words, codes)
"""
SMALL: dict[str, Any] = {**TINY_RUN, "task": "", "env_id": "Pendulum-v1", "total_timesteps": 50, "offline_steps": 5}
SMALL |= {"pretrain_steps": 5, "eval_every": 25, "eval_episodes": 1, "learning_starts": 0, "log_every": 5}
SMALL |= {"checkpoint_every": 1, "hidden_dim": 8, "base_hidden_dim": 8, "batch_size": 4, "save_model": True}


def pasted(source: str) -> str:
    """The script as someone changes it for a project of their own."""
    for old, new in (
        (r"(?m)^from utils\.data .*\n", "import tyro\n"),
        (r"(?m)^from utils\..*\n", ""),
        (r"(?m)^    env_flags = .*\n", ""),
        (r"make_env\(\*env_flags", 'gym.make("Pendulum-v1", max_episode_steps=12'),
        (r"(?m)^    data = load_dataset.*\n", DATA),
        (r"parse_args\(Args, __doc__\)", "tyro.cli(Args)"),
    ):
        source, count = re.subn(old, new, source)
        assert count, old
    return source


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the scripts, and their runs, killed and resumed."""
    folder, commands = tmp_path_factory.mktemp("project"), []
    for name in EVERY_SCRIPT:
        path = folder / f"{name.split('.')[-1]}.py"
        path.write_text(pasted((ROOT / f"{name.replace('.', '/')}.py").read_text()))
        words = flags_of(importlib.import_module(name), {**SMALL, "run_dir": folder / "runs" / name})
        commands.append([str(path), *words])
    command = [sys.executable, "-I", "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_a_pasted_script_trains_and_goes_on_after_a_kill(name, project):
    before = (ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()
    after = (project / f"{name.split('.')[-1]}.py").read_text().splitlines()
    changes = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    assert (
        sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in changes if kind != "equal") <= 12
    )  # lines that a user touches

    run_dir = project / "runs" / name
    rows, state = read_metrics(run_dir), torch.load(run_dir / "checkpoint.pt")
    assert [step for step in values_of(rows, "eval/return") if step >= 0] == [0, 25, 50]
    assert [step for step in values_of(rows, "losses/critic") if step > 0] == list(range(5, 51, 5))
    assert state["step"] == len(state["rows"][0]) == 50
    assert len(json.loads((run_dir / "args.json").read_text())["starts"]) == 2
    assert torch.load(run_dir / "agent.pt")["obs_dim"] == 3 and list(run_dir.glob("events.out.*"))
