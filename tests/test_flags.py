"""The command line: a task's settings under explicit flags, help in groups, and one line for what is wrong."""

import dataclasses
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import EVERY_SCRIPT, ROOT, refused

from expo_diffusion import Args
from utils.tasks import TASKS, parse_args

CLASSES = {name: importlib.import_module(name).Args for name in EVERY_SCRIPT}


def parse(line: str, cls: Any = Args) -> Any:
    return parse_args(cls, "A description.", ["" if word == "EMPTY" else word for word in line.split()])


@pytest.mark.parametrize("task, name", zip(TASKS, itertools.cycle(EVERY_SCRIPT)))  # every task with one of the scripts
def test_a_task_lays_its_settings_over_the_defaults(task, name):
    published, settings = vars(CLASSES[name]()), dict(TASKS[task].settings)
    if name == "expo_finetune":
        settings |= TASKS[task].finetune
    expected = published | {key: value for key, value in settings.items() if key in published}
    expected |= {"task": task, "env_id": TASKS[task].env_id, "dataset": TASKS[task].dataset}
    if task == "laptop":  # sizes alone, for an environment of one's own
        assert "--env-id is empty" in refused(parse, "--task laptop", CLASSES[name])
        expected |= {"task": "", "env_id": "Pusher-v5", "dataset": ("a.hdf5",)}
    words = "--env-id Pusher-v5 --dataset a.hdf5" if task == "laptop" else ""
    assert vars(parse(f"--task {task} {words}", CLASSES[name])) == expected


def test_the_table_fits_the_scripts():
    known = set().union(*(vars(cls()) for cls in CLASSES.values()))
    assert all(set(task.settings) | set(task.finetune) <= known for task in TASKS.values())
    assert {cls().task for cls in CLASSES.values()} == {parse("").task} == {"pointmaze-medium"}


@pytest.mark.parametrize("line", ["--task pointmaze-large --utd-ratio 20", "--utd_ratio=20 --task=pointmaze-large"])
def test_explicit_flags_win(line):
    """In any order, and even with the published value."""
    assert Args().utd_ratio == 20 != TASKS["pointmaze-large"].settings["utd_ratio"]
    assert vars(parse(line)) == vars(parse("--task pointmaze-large")) | {"utd_ratio": 20}


@pytest.mark.parametrize("line", ["--env-id Pusher-v5", "--env_id=Pusher-v5", "--task EMPTY --env-id Pusher-v5"])
def test_without_a_task_the_values_of_the_class_hold(line):
    expected = Args(task="", env_id="Pusher-v5", dataset=("a.hdf5", "b.hdf5"))
    assert parse(f"{line} --dataset a.hdf5 b.hdf5") == expected


@pytest.mark.parametrize("task", ["", "--task antmaze-umaze"])
def test_help_shows_groups_and_the_values_of_the_task(task, capsys):
    titles = re.findall(r"# ---- (.*)", inspect.getsource(Args))
    with pytest.raises(SystemExit) as stop:
        parse(f"{task} --help")
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    assert stop.value.code == 0 and "A description." in text
    assert len(titles) == 4 and sorted(titles, key=lambda title: text.index(f" {title} options --")) == titles
    for name, value in vars(parse(task)).items():
        shown = re.search(rf" --{name.replace('_', '-')}[, ].*? \(default: (.*?)\)", text)
        assert shown and shown[1] == (" ".join(value) if isinstance(value, tuple) else str(value) or "''"), name
        text = text[shown.end() :]  # the flags stand there in the order of the class


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_every_flag_has_a_help_text(name):
    source = inspect.getsource(CLASSES[name])
    for flag in vars(CLASSES[name]()):
        assert re.search(rf"(?m)^    {flag}: .* = .*  # \S.{{5,}}$", source), flag


RANGES = ["utd-ratio 0", "offline-ratio 1.5", "offline-ratio -0.1", "batch-size 1", "num-edit-samples -1", "tau nan"]
RANGES += ["edit-scale 0", "critic-lr -1", "reward-scale nan", "reward-shift inf", "num-min-critics 99", "init-alpha 0"]
RANGES += ["seed 99999999999999999999", "checkpoint-every 0", "heldout-share 1", "hidden-layers 0", "base-expansion 0"]
RANGES += ["guidance-lambda 0"]
WRONG = {f"--{line}": f"--{line.split()[0]} " for line in RANGES}  # flags -> what their message says
WRONG |= {"--utd-ration 4": "--utd-ration", "--utd-ratio many": "--utd-ratio", "--utd-ratio": "--utd-ratio"}
WRONG |= {"--seed 1.5": "--seed", "--backup soft": "--backup", "--device tpu": "--device", "--task": "--task"}
WRONG |= {"pointmaze-umaze": "pointmaze-umaze", "--task pointmaze-mediun": "did you mean 'pointmaze-medium'"}
WRONG |= {"--task pointmaze-umaze --env-id Pusher-v5": "without --task", "--env-id Pusher-v5": "--dataset is missing"}
WRONG["--env-id Pusher-v5 --dataset="] = "--dataset is missing"
WRONG |= {"--task= --dataset a.hdf5": "--env-id is empty", "--resume /nowhere": "--resume /nowhere"}
WRONG |= {"--resume=": "--resume is empty", "--resume EMPTY": "--resume is empty"}
WRONG |= {"--learning-starts 600": "--total-timesteps must exceed --learning-starts"}
WRONG |= {"--capture-video --eval-episodes 0": "--eval-episodes of at least 1"}
WRONG |= {"--track": "pip install wandb", "--device cuda": "finds no CUDA", "--compile": "Python.h"}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_be_is_refused(line, monkeypatch):
    if line == "--track":
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("utils.tasks.get_path", lambda _: "/nowhere")
    assert WRONG[line] in refused(parse, line, CLASSES["baselines.qflow" if "lambda" in line else "expo_finetune"])


def test_the_same_command_resumes_a_run_of_the_laptop_preset(tmp_path):
    line = "--task laptop --env-id Pusher-v5 --dataset a.hdf5"
    record = {"args": vars(parse(line)), "script": "expo_diffusion", "starts": [{"command": sys.argv}]}
    (tmp_path / "args.json").write_text(json.dumps(record | {"host": "another", "pid": 0}))
    expected = dataclasses.replace(parse(line), resume=str(tmp_path), run_dir=str(tmp_path))
    assert parse(f"{line} --resume {tmp_path}") == parse(f"--resume {tmp_path}") == expected
    assert "--task, --env-id cannot change" in refused(parse, f"--task pointmaze-umaze --env-id a --resume {tmp_path}")


@dataclasses.dataclass
class Own(Args):
    idea: float = 2.0  # weight of a new loss


def test_flags_can_be_inherited():
    args = parse("--idea 3 --utd-ratio 2", Own)
    assert (args.idea, args.utd_ratio, args.hidden_dim) == (3, 2, 64)  # the last one is the task's


def test_a_killed_run_leaves_all_its_lines_in_a_file():
    code = "import os; from expo_diffusion import *; parse_args(Args, argv=[]); print('a line'); os._exit(9)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (9, "a line\n")


def test_a_path_after_an_equals_sign_knows_the_home_folder():
    args = parse("--run-dir=~/run --env-id Pusher-v5 --dataset=~/a.hdf5")
    assert (args.run_dir, args.dataset) == (str(Path.home() / "run"), (str(Path.home() / "a.hdf5"),))


def test_a_script_in_its_own_process_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "baselines" / "rlpd.py", "--gamma", "2", "--run-dir", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(r"error: --gamma [^\n]+\n", done.stderr)
    assert not (tmp_path / "run").exists()
