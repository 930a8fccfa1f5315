"""The table of tasks, `python -m utils.data`, and the scripts on small files of the real tasks."""

import ctypes.util
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import expo_diffusion
import expo_finetune
from utils import cli, data, envs
from utils.envs import make_env
from utils.errors import InputError
from utils.evaluate import SCRIPTS
from utils.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "total_timesteps": 12,
    "learning_starts": 4,
    "offline_steps": 2,
    "max_episode_steps": 6,
    "eval_every": 6,
    "eval_episodes": 2,
    "log_every": 4,
    "utd_ratio": 2,
    "batch_size": 16,
    "hidden_dim": 16,
    "hidden_layers": 2,
    "base_hidden_dim": 16,
    "base_blocks": 1,
    "denoising_steps": 2,
    "threads": 1,
    "device": "cpu",
}
ALL_SCRIPTS = [importlib.import_module(name) for name in SCRIPTS]
BY_HAND = [name for name in TASKS if name.startswith(("antmaze", "adroit"))]


def random_file(path, env_id, rows=40, limit=10):
    """A D4RL-layout file of an environment's own random episodes, with its native actions."""
    env = make_env(env_id, max_episode_steps=limit)
    rng, columns = (
        np.random.default_rng(0),
        {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")},
    )
    low, high = envs.native_action_bounds(env)
    obs, _ = env.reset(seed=0)
    for i in range(rows):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for key, value in zip(
            columns, (obs, low + (action + 1) / 2 * (high - low), reward, terminated, truncated), strict=True
        ):
            columns[key].append(value)
        obs = env.reset(seed=i)[0] if terminated or truncated else next_obs
    data.write_d4rl(path, {key: np.array(values) for key, values in columns.items()}, {})
    return str(path)


def script_args(script, *flags, **settings):
    args = cli.parse_args(script.Args, list(flags))
    known = {field.name for field in dataclasses.fields(args)}
    return dataclasses.replace(args, **{key: value for key, value in {**SMALL, **settings}.items() if key in known})


# ------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_the_table(name):
    task = TASKS[name]
    scripts = [importlib.import_module(name) for name in SCRIPTS]
    known = {field.name for script in scripts for field in dataclasses.fields(script.Args)}
    assert set(task.settings) <= known, "a setting that no script has"
    envs.register_envs()
    assert task.env_id in gym.registry and task.about and task.source
    for word in task.dataset:
        path, address = data.locate(word)
        assert path.name and address


def test_published_settings():
    """tasks.md's first table, for the values that tell the tasks apart."""

    def settings(name):
        return cli.parse_args(expo_diffusion.Args, ["--task", name])

    for name in TASKS:
        args = settings(name)
        if name.startswith("antmaze"):
            assert (args.edit_scale, args.num_min_critics, args.reward_shift, args.learning_starts) == (
                0.05,
                1,
                -1,
                5000,
            )
        elif name.startswith("adroit"):
            assert (args.edit_scale, args.num_min_critics, args.reward_shift, args.learning_starts) == (0.7, 2, -1, 0)
            assert args.edit_dropout == 0.1
        elif name.startswith("robomimic"):
            assert (args.edit_scale, args.num_min_critics, args.learning_starts) == (0.05, 2, 5000)
        if not name.startswith("pointmaze"):
            assert (args.utd_ratio, args.batch_size, args.num_critics, args.gamma, args.tau) == (
                20,
                256,
                10,
                0.99,
                0.005,
            )
            assert (args.num_base_samples, args.num_edit_samples, args.denoising_steps) == (8, 8, 10)
    assert cli.parse_args(expo_finetune.Args, ["--task", "antmaze-large-play"]).pretrain_steps == 500_000
    assert cli.parse_args(expo_finetune.Args, ["--task", "antmaze-large-play"]).learning_starts == 0
    assert cli.parse_args(expo_finetune.Args, ["--task", "robomimic-square"]).pretrain_steps == 200_000
    adroit = cli.parse_args(expo_finetune.Args, ["--task", "adroit-door-binary"])
    assert (adroit.pretrain_steps, adroit.offline_steps, adroit.edit_scale) == (20_000, 2000, 0.05)
    assert cli.parse_args(expo_finetune.Args, ["--task", "adroit-door-binary", "--edit-scale", "0.7"]).edit_scale == 0.7
    for name, limit in (
        ("adroit-pen-binary", 100),
        ("adroit-door-binary", 200),
        ("antmaze-umaze", 700),
        ("robomimic-can", 400),
    ):
        assert envs.OWN[TASKS[name].env_id][2] == limit


# ------------------------------------------------------------------------------------------------------ the scripts


@pytest.mark.parametrize("name", BY_HAND)
def test_a_task_runs_on_its_own_rows(name, tmp_path):
    path = random_file(tmp_path / "rows.hdf5", TASKS[name].env_id)
    args = script_args(expo_diffusion, "--task", name, dataset=(path,), run_dir=str(tmp_path / "run"))
    expo_diffusion.main(args)
    metrics = (tmp_path / "run" / "metrics.csv").read_text()
    assert "eval/success_rate" in metrics and "losses/critic" in metrics


@pytest.mark.parametrize("env_id", ["FetchPush-v4", "FetchPickAndPlace-v4", "FrankaKitchen-v1"])
def test_any_environment_of_gymnasium_robotics(env_id, tmp_path):
    path = random_file(tmp_path / "rows.hdf5", env_id, rows=20)
    args = script_args(
        expo_diffusion, "--env-id", env_id, "--dataset", path, run_dir=str(tmp_path / "run"), total_timesteps=6
    )
    expo_diffusion.main(args)
    assert (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize("package", ["ogbench", "robosuite"])
def test_a_missing_package_says_how_to_install_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    task = TASKS["ogbench-cube-single" if package == "ogbench" else "robomimic-lift"]
    with pytest.raises(InputError, match=rf"{package} \(.*requirements-"):
        make_env(task.env_id, task.env_kwargs)


# ------------------------------------------------------------------------------------------------------- rendering


def in_process(code, **environment):
    keep = {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=keep | environment, capture_output=True, text=True
    )


MAKE = (
    "from utils.envs import make_env; env = make_env('expo/AdroitPenBinary-v1', render=True); print(env.render().std())"
)


@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="EGL is not installed")
def test_pictures_without_a_display():
    result = in_process(f"from utils.envs import make_env; make_env('expo/AdroitPenBinary-v1')\n{MAKE}")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 10 and "Exception ignored" not in result.stderr


def test_pictures_without_egl():
    """Loading the library fails as it does on a machine without it: one line that says what to install."""
    block = (
        "import ctypes, ctypes.util\n"
        "find, load = ctypes.util.find_library, ctypes.CDLL.__init__\n"
        "ctypes.util.find_library = lambda name: None if name == 'EGL' else find(name)\n"
        "def init(self, name, *args, **kwargs):\n"
        "    if 'EGL' in str(name): raise OSError('cannot open shared object file')\n"
        "    load(self, name, *args, **kwargs)\n"
        "ctypes.CDLL.__init__ = init\n"
    )
    result = in_process(block + MAKE)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError" in last and "libegl1" in last


# ---------------------------------------------------------------------------------------------- python -m utils.data


def run_cli(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["data", *words])
    code = 0
    try:
        data.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_list_names_every_task_and_where_its_data_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "door-human-v1.hdf5").write_bytes(bytes(1500))
    code, out, _ = run_cli(monkeypatch, capsys, "list")
    assert code == 0 and all(f"{name}:" in out for name in TASKS)
    assert f"1.5 kB at {tmp_path}" in out and "http://rail.eecs.berkeley.edu" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "nowhere.hdf5"), "no such file"),
        (("inspect", "nowhere.hdf5", "--task", "antmaze"), "unknown"),
        (("download", "nothing"), "neither a task nor a word"),
        (("generate", "ogbench-cube-billion"), "unknown"),
        (("generate", "pointmaze-huge"), "unknown"),
        (("generate", "pointmaze-umaze", "--episodes", "-1"), "negative"),
        (("replay", "nowhere.hdf5", "--task", "antmaze-umaze"), "no such file"),
        (("replay", "nowhere.hdf5", "--task", "antmaze"), "unknown"),
        (("replay", "generated:pointmaze-umaze", "--task", "antmaze-umaze"), "wide"),
    ],
)
def test_one_line_errors(monkeypatch, capsys, words, expected):
    code, _, err = run_cli(monkeypatch, capsys, *words)
    lines = err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("error: ") and expected in lines[-1] and "Traceback" not in err


def test_inspect_as_a_task_sees_it(monkeypatch, capsys, tmp_path):
    path = random_file(tmp_path / "rows.hdf5", "expo/AntMazeUMaze-v2")
    assert "not in the file" in run_cli(monkeypatch, capsys, "inspect", path)[1]
    code, out, _ = run_cli(monkeypatch, capsys, "inspect", path, "--task", "antmaze-umaze")
    assert code == 0 and "0 of 4 episodes" in out


def test_replay_prints_the_errors(monkeypatch, capsys, tmp_path):
    path = random_file(tmp_path / "rows.hdf5", "expo/AntMazeUMaze-v2")
    code, out, _ = run_cli(monkeypatch, capsys, "replay", path, "--task", "antmaze-umaze")
    assert code == 0 and "median" in out and "mujoco" in out
    from utils.replay import replay

    assert replay(path, "antmaze-umaze")["error"].max() < 1e-4, (
        "its own rows, but for float32 and the solver's warm start"
    )
