"""OGBench's tasks and home-made data, against the package's own loader (skipped where ogbench is not installed)."""

import dataclasses
import sys

import numpy as np
import pytest

import expo_diffusion
from utils import cli, data, envs, ogbench_oracle
from utils.errors import InputError
from utils.tasks import TASKS

ogbench = pytest.importorskip("ogbench")
NAMES = list(ogbench_oracle.KINDS)


@pytest.fixture(scope="module")
def files():
    return {name: ogbench_oracle.generate(name, episodes=2, seed=3, processes=2, steps=120) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_packages_loader(name, files):
    from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]
    from ogbench.utils import load_dataset  # pyright: ignore[reportMissingImports]

    env = envs.make_env(TASKS[f"ogbench-{name}"].env_id)
    rows = data.load_specs([str(files[name])], env)
    theirs = load_dataset(str(files[name]), add_info=True)
    relabel_dataset(env.get_wrapper_attr("name"), env, theirs)
    assert np.array_equal(rows.obs, theirs["observations"]) and np.array_equal(
        rows.next_obs, theirs["next_observations"]
    )
    assert np.array_equal(rows.rewards, theirs["rewards"]) and np.array_equal(rows.terminations, 1 - theirs["masks"])
    assert np.abs(rows.actions - theirs["actions"]).max() < 2e-5
    assert len(rows.episodes) == 2 and len(rows) == 240


@pytest.mark.parametrize("name", NAMES)
def test_rewards_of_rows_and_environment_agree(name, files):
    """The environment is put into the states of rows: its reward is the row's."""
    env = envs.make_env(TASKS[f"ogbench-{name}"].env_id)
    rows, file = data.load_specs([str(files[name])], env), np.load(files[name])
    env.reset(seed=0)
    simulator, kept = env.unwrapped, np.flatnonzero(~file["terminals"])
    for row in range(0, len(rows), 17):
        i = kept[row]
        state = [file["qpos"][i].astype(float), file["qvel"][i].astype(float)]
        if "button_states" in file:
            state.append(file["button_states"][i].copy())
        simulator.set_state(*state)  # pyright: ignore
        simulator.pre_step()  # pyright: ignore
        simulator.post_step()  # pyright: ignore
        _, reward, terminated, _, _ = env.step(np.zeros(5, np.float32))
        assert reward == rows.rewards[row] and terminated == bool(rows.terminations[row])


def test_the_same_seed_gives_the_same_data_for_any_number_of_processes(files, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPO_CACHE_DIR", str(tmp_path))
    again = np.load(ogbench_oracle.generate("cube-single", episodes=2, seed=3, processes=1, steps=120))
    first = np.load(files["cube-single"])
    assert sorted(again.files) == sorted(first.files)
    assert all(np.array_equal(again[key], first[key]) for key in first.files)


@pytest.mark.parametrize("name", NAMES)
def test_time_limits_are_the_packages(name):
    import gymnasium as gym

    env = envs.make_env(TASKS[f"ogbench-{name}"].env_id)
    spec, own = gym.spec(env.get_wrapper_attr("name")), gym.spec(TASKS[f"ogbench-{name}"].env_id)
    assert own.max_episode_steps == spec.max_episode_steps


def test_data_of_another_task_is_refused(files):
    env = envs.make_env(TASKS["ogbench-scene"].env_id)
    with pytest.raises(InputError, match="button_states"):
        data.load_specs([str(files["cube-single"])], env)
    env = envs.make_env(TASKS["ogbench-cube-double"].env_id)
    with pytest.raises(InputError, match="another task"):
        data.load_specs([str(files["cube-single"])], env)


def test_the_script_runs(files, tmp_path):
    args = cli.parse_args(expo_diffusion.Args, ["--task", "ogbench-cube-single"])
    small = {"total_timesteps": 20, "learning_starts": 5, "max_episode_steps": 10, "eval_every": 10, "eval_episodes": 2}
    small |= {"utd_ratio": 2, "batch_size": 16, "hidden_dim": 16, "base_hidden_dim": 16, "denoising_steps": 2}
    data_and_run = {"dataset": (str(files["cube-single"]),), "run_dir": str(tmp_path / "run"), "device": "cpu"}
    expo_diffusion.main(dataclasses.replace(args, **small, **data_and_run))
    assert "eval/success_rate" in (tmp_path / "run" / "metrics.csv").read_text()


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(InputError, match="requirements-ogbench"):
        ogbench_oracle.generate("cube-single", episodes=1)
