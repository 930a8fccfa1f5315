"""The scripts are siblings made to be read with diff. Each can be read in one sitting, and utils/ is thin."""

import ast
import graphlib
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import BASELINES, EVERY_SCRIPT, ROOT, VARIANTS, make_agent, make_batch

# What a script defines in its own way, beside Args and main. The rest is the text of expo_diffusion.py.
OWN = {"expo_flow": "BasePolicy", "expo_finetune": "", **dict.fromkeys(BASELINES, "Agent Optimizers update")}
OWN["variants.expo_faster"] = "BasePolicy Agent Optimizers update next_candidates"
OWN["variants.expo_chunks"] = "Batch ReplayBuffer BasePolicy Agent update_base_policy update evaluate"


def source_of(script: str) -> str:
    return (ROOT / f"{script.replace('.', '/')}.py").read_text()


def definitions(source: str) -> dict[str, str]:
    """Source of every module-level function and class, decorators included."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.name not in found, f"{node.name} is defined twice"
            found[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("name", OWN)
def test_shared_definitions_are_byte_identical(name):
    """And so are the last lines."""
    first, source = source_of("expo_diffusion"), source_of(name)
    mine, theirs = definitions(first), definitions(source)
    shared = [key for key in mine if key in theirs]
    assert {key for key in shared if mine[key] != theirs[key]} <= {"Args", "main", *OWN[name].split()}
    assert shared == [key for key in theirs if key in mine]  # in the same order
    assert {"Batch", "ReplayBuffer", "move_towards", "evaluate", "Log", "save", "load"} <= set(shared)
    assert source.partition("\nif __name__")[2] == first.partition("\nif __name__")[2]


FAMILY = [("expo_diffusion", "expo_flow", 50), ("expo_diffusion", "expo_finetune", 60)]
FAMILY += [(parent, name, 150) for name, parent in VARIANTS.items()]


@pytest.mark.parametrize("parent, other, most", FAMILY)
def test_siblings_are_close(parent, other, most):
    command = ["diff", f"{parent}.py", f"{other.replace('.', '/')}.py"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert 10 < sum(line.startswith(("<", ">")) for line in lines) <= most


@pytest.mark.parametrize("script", EVERY_SCRIPT)
def test_a_script_can_be_read_in_one_sitting(script):
    source = source_of(script)
    assert len(source.splitlines()) <= 700
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert node.end_lineno and node.end_lineno - node.lineno < 50, node.name
    flags = re.findall(r"^    (\w+): ", definitions(source)["Args"], re.M)
    assert len(flags) == len(set(flags)) > 20  # no flag is declared twice


def test_utils_is_thin_and_has_no_import_cycle():
    """A module's imports anywhere in it count, also those within functions."""
    modules = {path.stem: path.read_text() for path in (ROOT / "utils").glob("*.py")}
    assert sum(len(source.splitlines()) for source in modules.values()) <= 1300
    needs: dict[str, set[str]] = {}
    for name, source in modules.items():
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        words = {alias.name for node in imports if node.module == "utils" for alias in node.names}
        needs[name] = (words | {str(node.module).removeprefix("utils.") for node in imports}) & set(modules)
    graphlib.TopologicalSorter(needs).prepare()  # raises a CycleError


def in_a_process(code: str, folder: Path) -> str:
    """What a fresh Python prints to stdout; nothing may go wrong."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_quickstart_loads_little_of_utils(tmp_path, monkeypatch):
    """At most 700 lines, also where the data must be generated first. No simulator of another task."""
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path))
    code = """
        import sys, expo_diffusion as script
        args = script.parse_args(script.Args, argv=[])
        env = script.make_env(args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys)
        script.load_dataset(args.dataset, env, args.obs_keys)
        print("loaded", *(name for name in sys.modules if name.startswith("utils.")))
    """
    loaded = in_a_process(code, tmp_path).splitlines()[-1].split()[1:]
    paths = [ROOT / "utils" / "__init__.py", *(ROOT / f"{name.replace('.', '/')}.py" for name in loaded)]
    assert {"utils.data", "utils.envs", "utils.tasks"} <= set(loaded)
    assert not {"utils.antmaze", "utils.adroit", "utils.ogbench_env", "utils.robosuite_env", "utils.fetch_env"} & set(
        loaded
    )
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 700, loaded


def test_import_has_no_side_effect(tmp_path):
    """No output, no file, no random number drawn, no default of torch changed."""
    code = f"""
        import importlib, random, torch, numpy
        state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                         torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                         torch.get_float32_matmul_precision())
        before = state()
        for name in {EVERY_SCRIPT}:
            importlib.import_module(name)
        assert state() == before
    """
    assert in_a_process(code, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_flow_base_policy_fits_into_the_finetuning_script():
    """Paste BasePolicy of expo_flow.py over that of expo_finetune.py: it trains, with the other policy."""
    source, pasted = source_of("expo_finetune"), definitions(source_of("expo_flow"))["BasePolicy"]
    module = source.replace(definitions(source)["BasePolicy"], pasted)
    assert module.count("class BasePolicy") == 1 and "Flow matching" in module
    script: Any = ModuleType("expo_pasted")
    exec(compile(module, "expo_pasted.py", "exec"), vars(script))
    agent = make_agent(script)
    info = script.update(agent, script.Optimizers(agent, agent.args), make_batch(script, 2, 8))
    assert all(math.isfinite(value) for value in info.values()) and agent(torch.zeros(4, 3)).shape == (4, 2)
