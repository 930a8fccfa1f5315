"""robomimic's tasks on robosuite, in its own virtual environment (skipped where robosuite is not installed).

The demonstrations are made here, by a scripted arm in the simulator itself, and written in robomimic's layout.
"""

import dataclasses
import json
from typing import Any

import h5py
import numpy as np
import pytest

import expo_diffusion
from utils import cli, data, envs
from utils.errors import InputError
from utils.robomimic import OBS_KEYS
from utils.tasks import TASKS

pytest.importorskip("robosuite")
NAMES = ["lift", "can", "square"]
WIDTHS = {"lift": 19, "can": 23, "square": 23}


def task_env(name, **kwargs):
    task = TASKS[f"robomimic-{name}"]
    return envs.make_env(task.env_id, {**task.env_kwargs, **kwargs})


def lifting_action(obs, rng):
    """Above the cube, down to it, close, up: from hand position (3), quaternion (4), fingers (2), cube (10)."""
    to_cube = obs[9:12] - obs[:3]
    action = np.zeros(7)
    aligned = np.linalg.norm(to_cube[:2]) < 0.015
    closed = abs(obs[7] - obs[8]) < 0.05
    if aligned and abs(to_cube[2]) < 0.012:
        action[6] = 1
        if closed:
            action[2] = 1
    else:
        target = to_cube + np.array([0, 0, 0 if aligned else 0.06])
        action[:3] = np.clip(8 * target, -1, 1)
        action[6] = -1 if not (aligned and closed) else 1
    if closed and aligned:
        action[2], action[6] = 1, 1
    return np.clip(action + rng.normal(0, 0.02, 7) * (np.arange(7) < 3), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Four lifts in robomimic's layout; two more steps are recorded after each success, as people do."""
    path = tmp_path_factory.mktemp("lift") / "low_dim.hdf5"
    env, rng = task_env("lift"), np.random.default_rng(0)
    splits = np.cumsum([3, 4, 2])
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        seed = i = 0
        while i < 4:
            seed += 1
            obs, _ = env.reset(seed=seed)
            states, actions, rewards = [obs], [], []
            while sum(rewards) < 3 and len(actions) < 100:
                actions.append(lifting_action(states[-1], rng))
                obs, reward, *_ = env.step(actions[-1])
                states.append(obs)
                rewards.append(reward)
            if sum(rewards) < 3:
                continue  # a clumsy one
            for name, rows in (("obs", states[:-1]), ("next_obs", states[1:])):
                for key, part in zip(OBS_KEYS, np.split(np.array(rows), splits, axis=1), strict=True):
                    group[f"demo_{i}/{name}/{key}"] = part.astype(np.float64)
            group[f"demo_{i}/actions"] = np.array(actions, np.float64)
            group[f"demo_{i}/rewards"] = np.array(rewards)
            group[f"demo_{i}/dones"] = (np.array(rewards) > 0).astype(np.int64)
            i += 1
    return path


@pytest.mark.parametrize("name", NAMES)
def test_an_environment(name):
    env = task_env(name)
    first, _ = env.reset(seed=1)
    other, _ = env.reset()
    again, _ = env.reset(seed=1)
    assert first.shape == (WIDTHS[name],) and env.action_space.shape == (7,)
    assert np.array_equal(first, again) and not np.allclose(first, other), "the seed fixes the scene"
    for step in range(1, 31):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert obs.dtype == np.float32 and reward == float(info["success"]) == float(terminated) and not truncated, step


def test_observation_keys():
    env = task_env("lift", obs_keys=("object", "robot0_eef_pos"))
    assert env.reset(seed=0)[0].shape == (13,)
    with pytest.raises(InputError, match="robot0_eef_pos"):
        task_env("lift", obs_keys=("nothing",))


def test_demonstrations_end_at_their_first_success(demonstrations):
    whole = data.read(demonstrations)
    rows = data.load_specs([str(demonstrations)], task_env("lift"))
    assert whole.success is not None and whole.success.all(), "the scripted arm lifts the cube"
    assert rows.success is not None and rows.success.all() and len(rows.episodes) == 4
    assert rows.terminations.sum() == rows.rewards.sum() == 4 and len(rows) == len(whole) - 2 * 4
    assert (rows.terminations[rows.episodes[:, 1] - 1] == 1).all()
    with h5py.File(demonstrations) as file:
        position: Any = file["data/demo_0/next_obs/robot0_eef_pos"]
        assert np.allclose(rows.next_obs[rows.episodes[0, 1] - 2, :3], position[-4])


def test_other_tasks_data_is_refused(demonstrations):
    with pytest.raises(InputError, match=r"Lift.*PickPlaceCan"):
        data.load_specs([str(demonstrations)], task_env("can"))


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"control_freq": 10}, "control_freq"),
        ({"controller_configs": {"type": "OSC_POSE", "kp": 300}}, "kp"),
        ({"controller_configs": {"type": "BASIC", "body_parts": {"right": {"output_max": [0.1] * 6}}}}, "output_max"),
    ],
)
def test_data_of_another_controller_is_refused(demonstrations, tmp_path, recorded, words):
    path = tmp_path / "low_dim.hdf5"
    path.write_bytes(demonstrations.read_bytes())
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": recorded})
    with pytest.raises(InputError, match=words):
        data.load_specs([str(path)], task_env("lift"))


def test_a_few_hundred_steps_of_training(demonstrations, tmp_path):
    args = cli.parse_args(expo_diffusion.Args, ["--task", "robomimic-lift"])
    small = {"total_timesteps": 300, "learning_starts": 50, "eval_every": 300, "eval_episodes": 1, "log_every": 50}
    small |= {"utd_ratio": 2, "batch_size": 32, "hidden_dim": 32, "base_hidden_dim": 32, "denoising_steps": 3}
    small |= {"offline_steps": 200, "max_episode_steps": 100, "threads": 1, "device": "cpu"}
    expo_diffusion.main(
        dataclasses.replace(args, **small, dataset=(str(demonstrations),), run_dir=str(tmp_path / "run"))
    )
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) > 6 and "eval/base_success_rate" in lines[0]
