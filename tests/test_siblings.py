"""The scripts are siblings made to be read with diff: shared definitions are byte-identical, differences few."""

import ast
import csv
import difflib
import math
import os
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, SCRIPTS, TINY_RUN, flags_of

import expo_finetune

OWN = {"Args", "BasePolicy", "main"}  # what a script may define in its own way
BASELINES = sorted((ROOT / "baselines").glob("*.py"))
BASELINE_OWN = {"Args", "Agent", "Optimizers", "make_optimizers", "update", "main", "td_target", "critic_loss"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def source_of(script: str) -> str:
    return (ROOT / f"{script}.py").read_text()


def extent(node: Definition) -> tuple[int, int]:
    """First and last line, decorators included."""
    assert node.end_lineno is not None
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno


def definitions(source: str) -> dict[str, str]:
    """Source of every module-level function and class, decorators included."""
    lines, found = source.splitlines(keepends=True), {}
    for node in ast.parse(source).body:
        if isinstance(node, Definition):
            first, last = extent(node)
            assert node.name not in found, f"{node.name} is defined twice"
            found[node.name] = "".join(lines[first - 1 : last])
    return found


def changed_lines(first: str, second: str) -> int:
    """Lines that `diff` deletes plus lines that it adds (git's count)."""
    command = ["git", "diff", "--no-index", "--numstat", f"{first}.py", f"{second}.py"]
    added, deleted, _ = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split(maxsplit=2)
    return int(added) + int(deleted)


def test_definitions_sees_decorators_and_changes():
    """The tool of the tests below: a changed decorator, default, docstring or comment all count."""
    source = "import x\n\n@x.a\ndef f(y=1):\n    'doc'  # why\n    return y\n\nclass C:\n    z = 2\n"
    assert definitions(source) == {
        "f": "@x.a\ndef f(y=1):\n    'doc'  # why\n    return y\n",
        "C": "class C:\n    z = 2\n",
    }
    for old, new in (("@x.a", "@x.b"), ("y=1", "y=2"), ("doc", "dog"), ("why", "who")):
        assert definitions(source.replace(old, new))["f"] != definitions(source)["f"]


@pytest.mark.parametrize(
    "path", [*(ROOT / f"{script}.py" for script in SCRIPTS), *BASELINES], ids=lambda path: path.stem
)
def test_no_flag_is_declared_twice(path):
    flags = re.findall(r"^    (\w+): ", definitions(path.read_text()).get("Args", ""), re.M)
    assert len(flags) == len(set(flags)) and (len(flags) > 20 or path.stem == "__init__")


def test_all_scripts_define_the_same_names():
    names = {script: set(definitions(source_of(script))) for script in SCRIPTS}
    assert OWN | {"Agent", "Critic", "EditPolicy", "DenoisingNetwork", "td_target", "update"} <= names[SCRIPTS[0]]
    for script in SCRIPTS[1:]:
        assert names[script] == names[SCRIPTS[0]]


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_shared_definitions_are_byte_identical(other):
    mine, theirs = definitions(source_of(SCRIPTS[0])), definitions(source_of(other))
    shared = (set(mine) & set(theirs)) - OWN
    assert len(shared) > 15
    assert [name for name in mine if name in shared and mine[name] != theirs[name]] == []
    assert [name for name in mine if name in shared] == [name for name in theirs if name in shared]  # same order


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_what_lies_between_the_definitions_is_the_same(other):
    """Constants, section lines and the last lines; imports may differ by what main alone needs."""

    def rest(script: str) -> list[str]:
        source = source_of(script)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, Definition | ast.Import | ast.ImportFrom) or docstring:
                first, last = extent(node) if isinstance(node, Definition) else (node.lineno, node.end_lineno)
                lines[first - 1 : last] = [""] * (last - first + 1)  # pyright: ignore
        return [line for line in lines if line]

    assert rest(other) == rest(SCRIPTS[0])
    assert rest(other)[-2:] == ['if __name__ == "__main__":', "    cli.run(main, Args, __doc__)"]


def test_the_finetuned_base_policy_is_one_of_the_others():
    """So that the slow tests of BasePolicy need to run on two scripts only."""
    mine = definitions(source_of("expo_finetune"))["BasePolicy"]
    assert mine in [definitions(source_of(script))["BasePolicy"] for script in ("expo_diffusion", "expo_flow")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kind_of_base_policy_is_named_where_it_differs_only(script):
    source = source_of(script)
    lines = source.splitlines()
    tree = ast.parse(source)
    allowed = set(range(1, (tree.body[0].end_lineno or 1) + 1))  # the docstring
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, Definition) and node.name in OWN:
            first, last = extent(node)
            allowed |= set(range(first, last + 1))
    wrong = [n for n, line in enumerate(lines, 1) if n not in allowed and re.search("diffusion|flow", line, re.I)]
    assert wrong == []
    assert any(re.search("diffusion|flow", line, re.I) for line in lines)
    assert f'script="{script}"' in definitions(source)["main"]


@pytest.mark.parametrize("other, most", [("expo_flow", 60), ("expo_finetune", 120)])
def test_siblings_are_close(other, most):
    changed = changed_lines("expo_diffusion", other)
    one_by_one = difflib.ndiff(source_of("expo_diffusion").splitlines(), source_of(other).splitlines())
    assert changed == pytest.approx(sum(line.startswith(("+", "-")) for line in one_by_one), abs=20)
    assert 10 < changed <= most


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_read_in_one_sitting(script):
    source = source_of(script)
    lines = source.splitlines()
    assert len(lines) < 550
    assert max(map(len, lines)) <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "main":
            first, last = extent(node)
            assert last - first + 1 <= 50, node.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_base_policy_has_the_three_members(script):
    (policy,) = (n for n in ast.parse(source_of(script)).body if isinstance(n, ast.ClassDef) and n.name == "BasePolicy")
    methods = {node.name: [a.arg for a in node.args.args] for node in policy.body if isinstance(node, ast.FunctionDef)}
    assert methods == {
        "__init__": ["self", "obs_dim", "action_dim", "args"],
        "loss": ["self", "obs", "actions"],
        "sample": ["self", "obs"],
    }


def test_import_has_no_side_effect(tmp_path):
    """No output, no file, no random number drawn, no default of torch changed."""
    code = """
        import random, torch, numpy
        state = lambda: (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()),
                         torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        before = state()
        import expo_diffusion, expo_flow, expo_finetune
        assert state() == before
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_flow_base_policy_fits_into_the_finetuning_script(tmp_path):
    """Paste BasePolicy of expo_flow.py over that of expo_finetune.py: the module trains, with the other policy."""
    target, pasted = source_of("expo_finetune"), definitions(source_of("expo_flow"))["BasePolicy"]
    module = target.replace(definitions(target)["BasePolicy"], pasted)
    assert module != target and module.count("class BasePolicy") == 1 and "Flow matching" in module
    path = tmp_path / "expo_pasted.py"
    path.write_text(module)
    flags = {**TINY_RUN, "total_timesteps": 20, "pretrain_steps": 200, "run_dir": tmp_path / "run"}
    command = [sys.executable, str(path), *flags_of(expo_finetune, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["losses/base_policy"]) for row in rows if row["losses/base_policy"]]
    assert int(rows[-1]["step"]) == 20 and len(losses) >= 6 and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_baselines_share_their_definitions_with_the_script(path):
    script, baseline = definitions(source_of("expo_diffusion")), definitions(path.read_text())
    shared = [name for name in baseline if name in script and name not in BASELINE_OWN]
    assert [name for name in shared if baseline[name] != script[name]] == []
