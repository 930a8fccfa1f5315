"""The table of tasks, and the command line that lays a task's settings over a script's own defaults."""

import contextlib
import difflib
import inspect
import io
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module, util
from pathlib import Path
from sysconfig import get_path
from typing import Annotated, Any, get_type_hints

import tyro

from utils import InputError


@dataclass(frozen=True)
class Task:
    env_id: str  # Gymnasium's name of the environment
    dataset: tuple[str, ...]  # what --dataset would say
    about: str
    settings: dict[str, Any]  # flag -> value; a script passes over the flags that it does not have
    finetune: dict[str, Any] = field(default_factory=dict)  # more settings, for expo_finetune.py alone
    env_kwargs: dict[str, Any] = field(default_factory=dict)  # for gymnasium.make
    source: str = "ours"  # of the settings


MAZES = {  # rows from the top; 1 wall, r start, g goal
    "umaze": "11111 1r001 11101 1g001 11111",
    "medium": "11111111 1r011001 10010001 11000111 10010001 10100101 100010g1 11111111",
    "large": "111111111111 1r0001000001 101101010101 100000010001 101111011101 100101000001 110101010111 100100010g01 "
    "111111111111",
}

# Sizes for a laptop without a GPU, which are ours. Networks this small gain little from a second thread.
LAPTOP = (
    dict(hidden_dim=64, hidden_layers=2, base_hidden_dim=64, base_blocks=1, base_expansion=2, num_critics=4)
    | dict(utd_ratio=4, batch_size=128, num_base_samples=4, num_edit_samples=4, denoising_steps=5)
    | dict(total_timesteps=2_000, eval_every=200, eval_episodes=20, log_every=50, checkpoint_every=500, threads=1)
    # Imitation and critics learn from the demonstrations first: success falls to 0 while untrained critics choose.
    | dict(pretrain_steps=3_000, offline_steps=1_500, learning_starts=0)
    # Value travels back by one action in 1 / tau updates. With .02 values stayed wrong near the goal.
    | dict(tau=0.05, ema_rate=0.005)  # the second averages 200 updates, because a run has only thousands
)
QUICKSTART = LAPTOP | dict(total_timesteps=600, eval_every=100, critic_lr=6e-4, edit_scale=0.2, init_alpha=0.1)
# 10 at the goal, 0 before it. With -1 per step, the critics prefer what they do not know yet. One action changes a
# value by a share of 1 - gamma: at .99 this is less than the error of small critics. Hence also the long actions.
QUICKSTART |= dict(reward_scale=10.0, gamma=0.96, action_repeat=10, guidance_lambda=0.3, chunk_length=2)
TASKS: dict[str, Task] = {"laptop": Task("", (), "small networks, short runs: give --env-id and --dataset", LAPTOP)}
for name, env_name, limit, more, about in (
    ("umaze", "UMaze", 24, {}, "a U-shaped corridor, the easiest maze"),
    ("medium", "Medium", 43, {}, "the quickstart: minutes on a laptop CPU"),
    ("large", "Large", 80, dict(offline_steps=2_000, total_timesteps=1_000), "a longer way"),
):  # the time limit is near the demonstrators' own speed, so that imitation alone does not solve the task
    maze = [[int(c) if c in "01" else c for c in row] for row in MAZES[name].split()]
    settings, kwargs = QUICKSTART | {"max_episode_steps": limit} | more, dict(maze_map=maze, continuing_task=False)
    env_id, data = f"PointMaze_{env_name}-v3", (f"generated:pointmaze-{name}",)
    TASKS[f"pointmaze-{name}"] = Task(env_id, data, about, settings, env_kwargs=kwargs)

FETCH = QUICKSTART | dict(max_episode_steps=24, action_repeat=2)  # near the demonstrators' speed, as in the mazes
FETCH |= dict(gamma=0.97, offline_steps=3_000, critic_lr=3e-4)  # 1,500 and 6e-4 start at half the success (one run)
FETCH |= dict(hidden_dim=128, base_hidden_dim=128, base_lr=1e-3)  # more to imitate, in as few updates
FETCH |= dict(num_base_samples=8, num_edit_samples=8, num_target_samples=2)  # 4 per target: slower and no better
FETCH |= dict(edit_scale=0.05, total_timesteps=1_000, eval_every=250)  # the search is in docs/log.md
about, data = "an arm lifts a block into the air", ("generated:fetch-pick-and-place",)
TASKS["fetch-pick-and-place"] = Task("expo/FetchPickAndPlace-v1", data, about, FETCH)

# From here on the settings are published (the authors' scripts), but for those that are marked as ours.
ANTMAZE = dict(num_min_critics=1, reward_shift=-1.0, edit_scale=0.05, pretrain_steps=500_000, time_frequencies=8)
for name, env_name, eta, lam, about in (  # eta: weight of Diffusion-QL's Q term; lam: Q-Flow's lambda
    ("umaze", "UMaze", 0.5, 0.2, "an ant walks around one corner"),
    ("umaze-diverse", "UMaze", 2.0, 0.2, "the same, data from and to anywhere"),
    ("medium-play", "Medium", 2.0, 0.5, "an ant crosses a medium maze"),
    ("medium-diverse", "Medium", 3.0, 0.5, "the same, data to anywhere"),
    ("large-play", "Large", 4.5, 0.2, "an ant crosses a large maze"),
    ("large-diverse", "Large", 3.5, 0.2, "the same, data to anywhere"),
):
    settings = ANTMAZE | dict(expectile=0.9, eta=eta, max_q_backup=name != "umaze", guidance_lambda=lam, hidden_dim=256)
    data, finetune = (f"d4rl:antmaze-{name}-v2",), dict(num_edit_samples=0)  # the paper's; the authors' script edits
    TASKS[f"antmaze-{name}"] = Task(f"expo/AntMaze{env_name}-v2", data, about, settings, finetune, source="published")

ADROIT = dict(learning_starts=0, reward_shift=-1.0, edit_scale=0.7, edit_dropout=0.1, total_timesteps=300_000)
ADROIT |= dict(pretrain_steps=20_000, eta=0.1)  # eta: that of pen-cloned
FINETUNE = dict(edit_scale=0.05, offline_steps=2_000)  # [ours 7] edits of .7 lose the prior: docs/log.md
for name, about in (
    ("pen", "a hand turns a pen to a given direction"),
    ("door", "a hand unlatches and opens a door"),
    ("relocate", "a hand carries a ball to a given place"),
    ("hammer", "a hand drives in a nail"),
):
    env_id, data = f"expo/Adroit{name.capitalize()}Binary-v1", (f"d4rl:{name}-human-v1", f"d4rl:{name}-cloned-v1")
    TASKS[f"adroit-{name}-binary"] = Task(env_id, data, about, ADROIT, FINETUNE, source="published, but for the data")

OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
ROBOMIMIC = dict(edit_scale=0.05, eval_every=10_000, eval_episodes=50, pretrain_steps=200_000, obs_keys=OBS_KEYS)
for name, env_name, data, steps, finetune_scale, about in (  # :10 is the first 10 demonstrations
    ("robomimic-lift", "RobomimicLift", "robomimic:lift/ph:10", 120_000, 0.1, "an arm lifts a cube"),
    ("robomimic-can", "RobomimicCan", "robomimic:can/mh", 120_000, 0.1, "an arm puts a can into its bin"),
    ("robomimic-square", "RobomimicSquare", "robomimic:square/ph", 150_000, 0.1, "an arm puts a square nut on its peg"),
    ("mimicgen-stack", "MimicGenStack", "mimicgen:stack_d0:200", 200_000, 0.05, "an arm stacks two cubes"),
    ("mimicgen-threading", "MimicGenThreading", "mimicgen:threading_d0:50", 200_000, 0.05, "an arm threads a needle"),
):
    settings, finetune = ROBOMIMIC | dict(total_timesteps=steps), dict(edit_scale=finetune_scale)
    TASKS[name] = Task(f"expo/{env_name}-v1", (data,), about, settings, finetune, dict(obs_keys=OBS_KEYS), "published")

OGBENCH = dict(edit_scale=0.1, eval_every=25_000, total_timesteps=500_000)  # ours, not tuned
for name, env_name, more, about in (  # more: of Q-Flow, published
    ("cube-single", "CubeSingle", dict(guidance_lambda=5.0), "an arm moves a cube to its place"),
    ("cube-double", "CubeDouble", dict(guidance_lambda=2.0), "an arm moves two cubes"),
    ("scene", "Scene", dict(guidance_lambda=5.0), "an arm with a cube, buttons, a drawer and a window"),
    ("puzzle-3x3", "Puzzle3x3", dict(guidance_lambda=20.0, critic_agg="min"), "an arm presses 9 linked buttons"),
):
    TASKS[f"ogbench-{name}"] = Task(f"expo/OGBench{env_name}-v0", (f"ogbench:{name}-play-v0",), about, OGBENCH | more)

CHANGEABLE = ("dataset", "total_timesteps", "eval_every", "eval_episodes", "log_every", "checkpoint_every")
CHANGEABLE += ("save_model", "capture_video", "track", "threads", "device", "compile")  # at a resume; no others
MAY_BE_0 = ("seed", "threads", "total_timesteps", "learning_starts", "pretrain_steps", "offline_steps", "base_blocks")
MAY_BE_0 += ("max_episode_steps", "num_edit_samples", "num_target_samples", "eval_episodes")  # others: 1 at least
SHARES = ("offline_ratio", "gamma", "tau", "ema_rate", "edit_dropout", "expectile", "heldout_share")


def parse_args(cls: type, description: str | None = None, argv: list[str] | None = None) -> Any:
    """An instance of the dataclass `cls` from the command line (or `argv`); an InputError if that would fail later.

    The settings of `--task`, or of the task that `cls` names, are laid over the defaults of `cls`. `--task ""`, or
    `--env-id` alone, leaves the defaults as they are. With `--resume DIR` the flags of that run are the defaults.
    """
    getattr(sys.stdout, "reconfigure", dict)(line_buffering=True, errors="backslashreplace")  # for `> log` and `| tee`
    home, default = os.path.expanduser("~/"), cls()
    argv = [word.replace("=~/", f"={home}", 1) for word in (sys.argv[1:] if argv is None else argv)]
    given = vars(read_flags(default, [word for word in argv if word not in ("-h", "--help")], description))
    flags, run_dir = vars(default), given.get("resume")
    alone = given.get("env_id") and not any(word.startswith("--task") for word in argv)
    flags["task"] = name = "" if alone else given.get("task")
    if run_dir:
        try:
            record = json.loads((Path(run_dir) / "args.json").read_text())
            saved = {key: tuple(v) if isinstance(v, list) else v for key, v in record["args"].items()}
            script, here = record["script"], Path(inspect.getfile(cls)).stem
            words, same_machine = record["starts"][-1]["command"], record["host"] == platform.node()
            started, now = ([Path(w[0]).name, *re.findall(r"--change.(\w+)", " ".join(w))] for w in (words, sys.argv))
            process = Path(f"/proc/{record['pid']}/cmdline")
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"--resume {run_dir}: no run there; its args.json is missing or damaged") from None
        if (script, started) != (here, now):
            raise InputError(f"--resume {run_dir}: {' '.join(started)} started this run of {script}; resume with that")
        if same_machine and record["pid"] != os.getpid() and process.exists() and started[0] in process.read_text():
            raise InputError(f"--resume {run_dir}: process {record['pid']} is still writing it; stop that one first")
        flags.update({key: saved[key] for key in flags if key in saved}, resume=run_dir, run_dir=run_dir)
    elif any(word.startswith("--resume") for word in argv):
        raise InputError("--resume is empty; it needs the folder of a run")
    elif name in TASKS:
        settings = TASKS[name].settings | (TASKS[name].finetune if "pretrained" in flags else {})
        flags.update({key: settings[key] for key in flags if key in settings})
        flags.update(env_id=TASKS[name].env_id, dataset=TASKS[name].dataset)
    elif name:
        close = "".join(f"; did you mean {word!r}?" for word in difflib.get_close_matches(name, TASKS, 1))
        raise InputError(f"--task {name!r} is unknown{close} (known: {', '.join(TASKS)})")
    args = read_flags(default, argv, description)
    if name in TASKS and not TASKS[name].env_id:  # "laptop": sizes alone
        args.task, flags["task"] = "", flags["task"] if run_dir else ""
    changed = [f"--{key.replace('_', '-')}" for key in flags if vars(args)[key] != flags[key] and key not in CHANGEABLE]
    if run_dir and changed:
        raise InputError(f"--resume {run_dir}: {', '.join(changed)} cannot change; start a new run for that")
    if flags["task"] and "--env-id" in changed:
        raise InputError(f"--task {name} is {flags['env_id']}; give --env-id and --dataset without --task")
    check_flags(vars(args))
    return args


def read_flags(default: Any, argv: list[str], description: str | None) -> Any:
    """tyro's answer. In --help the flags stand in groups, one for every comment line `# ---- NAME` of the class."""
    hints, parts, title = get_type_hints(type(default)), {}, "the flags"
    source = "".join(map(inspect.getsource, type(default).__mro__[-2::-1]))  # what it inherits comes first
    for line in map(str.strip, source.splitlines()):
        name, text = line.partition(":")[0], line.partition("  # ")[2]
        title = line.strip("# -") if line.startswith("# ----") else title
        if name in hints:
            flag = Annotated[hints.pop(name), tyro.conf.arg(help=text)]
            parts.setdefault(title, []).append((name, flag, field(default=vars(default)[name])))
    groups = [Annotated[make_dataclass("Part", part), tyro.conf.arg(name=title)] for title, part in parts.items()]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            whole: Any = make_dataclass("Flags", [(f"part{i}", group) for i, group in enumerate(groups)])
            answer = tyro.cli(whole, args=argv, description=description, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [re.sub("[│─╭╮╰╯]+|-{9,}", " ", line).strip() for line in box.getvalue().splitlines()[1:]]
        message = "\n".join(lines).partition("\n\n")[0].replace("\n", " ")  # up to the first rule
        raise InputError(f"{message.rstrip('.')} (--help shows all flags)") from None
    return type(default)(**{name: value for part in vars(answer).values() for name, value in vars(part).items()})


def check_flags(flags: dict[str, Any]) -> None:
    """Raises InputError for values that would fail late, or silently."""
    low = dict(batch_size=2, edit_scale=1e-6, init_alpha=1e-9, reward_scale=-1e30, reward_shift=-1e30)
    high = dict.fromkeys(SHARES, 1) | dict(heldout_share=0.9, edit_scale=2, seed=2**31 - 1)
    high["num_min_critics"], low["guidance_lambda"] = flags.get("num_critics", 1), 1e-9
    for name, value in flags.items():
        least, most = low.get(name, int(type(value) is int and name not in MAY_BE_0)), high.get(name, 1e30)
        if isinstance(value, int | float) and not least <= value <= most:
            bound = f"at most {most:g}" if value > most else f"at least {least:g}"
            raise InputError(f"--{name.replace('_', '-')} {value} must be {bound}")
    given, found, cuda = flags.get, util.find_spec, lambda: import_module("torch").cuda.is_available()
    compiler = any(map(shutil.which, ("g++", "clang++", "c++"))) and Path(get_path("include"), "Python.h").exists()
    run_files = [Path(given("run_dir") or ".", name) for name in ("args.json", "metrics.csv")]
    holds_run = given("run_dir") and not given("resume") and any(p.exists() and p.stat().st_size for p in run_files)
    for wrong, problem in (
        (not flags["env_id"], "--env-id is empty; name a --task or an --env-id"),
        (holds_run, f"--run-dir {given('run_dir')} already holds a run; choose another folder, or --resume it"),
        (not all(flags["dataset"] or [""]), "--dataset is missing: every script starts from data (docs/data.md)"),
        (0 < flags["total_timesteps"] <= flags["learning_starts"], "--total-timesteps must exceed --learning-starts"),
        (given("device") == "cuda" and not cuda(), "--device cuda: torch finds no CUDA here"),
        (given("compile") and not compiler, "--compile needs a C++ compiler and Python.h: apt install g++ python3-dev"),
        (given("track") and not found("wandb"), "--track needs a package: pip install wandb"),
        (given("capture_video") and not given("eval_episodes"), "--capture-video needs --eval-episodes of at least 1"),
        (given("capture_video") and not found("moviepy"), "--capture-video needs a package: pip install moviepy"),
    ):
        if wrong:
            raise InputError(problem)
