"""fetch-pick-and-place: goals, observations against MuJoCo's state, success, and the demonstrations."""

from typing import Any

import mujoco
import numpy as np

from demonstrations import fetch, record
from utils.data import read_dataset
from utils.envs import make_env
from utils.tasks import TASKS

NAME = "fetch-pick-and-place"
FLAGS = TASKS[NAME].env_id, NAME, TASKS[NAME].settings["max_episode_steps"], TASKS[NAME].settings["action_repeat"]
CENTER, STILL = np.array([1.34, 0.75, 0.425]), np.zeros(4, np.float32)


def test_goals_are_in_the_air():
    """Within .15 m of the middle, as the blocks, and .1 to .4 m above a block at rest."""
    env: Any = make_env(*FLAGS)
    arm = env.unwrapped
    places = np.array([[env.reset(seed=s) and arm.goal, arm.data.site("object0").xpos.copy()] for s in range(300)])
    goals, blocks = np.moveaxis(places - CENTER, 1, 0)
    assert np.allclose(goals.min(axis=0), [-0.15, -0.15, 0.1], atol=0.01) and np.ptp(blocks[:, 2]) < 1e-3
    assert np.allclose(goals.max(axis=0), [0.15, 0.15, 0.4], atol=0.01) and np.abs(blocks).max() < 0.16


def test_observations_by_hand():
    """All 22 numbers from MuJoCo's own state, in every step of a demonstration that lifts the block."""
    env: Any = make_env(*FLAGS)
    arm, (obs, _), done, rows = env.unwrapped, env.reset(seed=1_000_004), False, []
    act, jacobian = fetch.Controller(env, obs, np.random.default_rng(0)).act, np.zeros((2, 3, arm.model.nv))
    while not done:
        obs, _, terminated, truncated, _ = env.step(act(obs))
        done, sites = terminated or truncated, [arm.data.site(name) for name in ("robot0:grip", "object0")]
        for matrix, site in zip(jacobian, sites, strict=True):
            mujoco.mj_jacSite(arm.model, arm.data, matrix, None, site.id)  # pyright: ignore
        (hand, block), moves = (site.xpos for site in sites), 0.04 * jacobian @ arm.data.qvel  # m, m per .04 s
        fingers = [arm.data.joint(f"robot0:{side}_gripper_finger_joint") for side in "rl"]
        r = sites[1].xmat.reshape(3, 3)  # = Rx Ry Rz
        angles = np.arctan2(-r[1, 2], r[2, 2]), np.arcsin(r[0, 2]), np.arctan2(-r[0, 1], r[0, 0])
        expected = [*5 * (hand - CENTER), *10 * (block - hand), *5 * (arm.goal - block)]
        expected += [20 * sum(finger.qpos[0] for finger in fingers), *angles, *30 * (moves[1] - moves[0])]
        expected += [*30 * moves[0], 4 * sum(finger.qvel[0] for finger in fingers)]
        rows.append(np.abs([obs, obs - [*expected, 10 * (block[2] - 0.425), 10 * (hand[2] - 0.425)]]))
    size, error = np.max(rows, axis=0)
    assert error.max() < 1e-5 and 0.5 < size.mean() < 2 and size.max() < 5 and size[20] > 0.5  # lifted by 5 cm


def test_success_is_rewarded_and_ends():
    env: Any = make_env(*FLAGS)
    for offset, expected in ((0.04, True), (0.06, False)):  # metres from the goal; 5 cm are near enough
        env.reset(seed=3)
        env.unwrapped.goal = env.unwrapped.data.site("object0").xpos + np.array([0, 0, offset])
        _, reward, terminated, truncated, info = env.step(STILL)
        assert (reward, terminated, truncated, info["success"]) == (float(expected), expected, False, expected)
    assert [env.step(STILL)[2:4] for _ in range(23)] == [(False, False)] * 22 + [(False, True)]


def test_demonstrations():
    """The same for the same seed. Half of them succeed, all approaches occur, and the simulator repeats the rows."""
    env = make_env(*FLAGS)
    first, again, other = (record(env, fetch.Controller, n, seed) for n, seed in ((50, 0), (2, 0), (2, 1)))
    obs, actions, ends = first["observations"], first["actions"], first["terminals"] | first["timeouts"]
    starts, share = np.flatnonzero(np.roll(ends, 1)), first["infos/success"][ends].mean()
    assert len(starts) == 50 and 0.35 <= share <= 0.65 and np.array_equal(first["terminals"], first["rewards"] == 1)
    assert np.abs(actions).max() <= 1 and 0.84 < np.abs(actions[:, 3]).min() < np.abs(actions[:, 3]).max() < 0.96
    assert np.abs(obs).max() < 6 and obs.std(axis=0).min() > 0.05
    assert all(np.array_equal(array, first[key][: len(array)]) for key, array in again.items())
    assert obs.shape[1] == 22 and not np.array_equal(obs[0], other["observations"][0])
    assert np.array_equal(read_dataset([f"generated:{NAME}"], env).rows.obs, obs)
    read = [read_dataset([f"generated:{NAME}:{n}"], env) for n in (2, 51)]  # fewer and more than usual
    assert [len(data.episodes) for data in read] == [2, 51]
    assert all(np.array_equal(data.rows.obs[: len(obs)], obs[: len(data.rows.obs)]) for data in read)
    for episode in (0, 7, 49):
        env.reset(seed=episode)
        assert all(np.array_equal(env.step(actions[row])[0], obs[row + 1]) for row in starts[episode] + np.arange(9))
    # Which way is the block, when the hand is first within 6 cm: below, on the far side, or on the near side?
    ways = [way[(np.linalg.norm(way, axis=1) < 0.6).argmax()] for way in np.split(obs[:, 3:6], starts[1:])]
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    counts = [(ways @ side > 0.8).sum() for side in ([0, 0, -1], [1, 0, 0], [-1, 0, 0])]
    assert counts[0] >= 15 and min(counts) >= 4, counts
