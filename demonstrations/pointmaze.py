"""The quickstart's demonstrations in gymnasium-robotics' PointMaze.

A controller walks shortest paths between the centres of cells. Sometimes it makes a detour, or walks to another cell
and stops there. Every episode has a speed of its own, and the actions carry correlated noise.
"""

import collections
import functools

import gymnasium as gym
import numpy as np

from utils import InputError
from utils.arrays import Arrays
from utils.envs import make_env
from utils.tasks import MAZES, TASKS


def demonstrations(name: str, env: gym.Env | None = None) -> Arrays:
    """The data of the task `name`. `env` is where it will be used: an action must last as long there as it did here."""
    check_name(name)
    repeat = TASKS[name].settings["action_repeat"]
    there = env.get_wrapper_attr("repeat") if env is not None and env.has_wrapper_attr("repeat") else repeat
    if there != repeat:
        raise InputError(f"--action-repeat {there}: it is made with {repeat}; its actions are others")
    return dict(generate(name))


def check_name(name: str) -> None:
    known = [task for task in TASKS if task.startswith("pointmaze-")]
    if name not in known:
        raise InputError(f"no such task (known: {', '.join(f'generated:{task}' for task in known)})")


@functools.cache
def generate(name: str, num_episodes: int = 60, seed: int = 0) -> Arrays:
    """Demonstrations as flat arrays under D4RL's keys (observations 8 wide, actions 2), the same for the same seed."""
    limit, repeat = (TASKS[name].settings[key] for key in ("max_episode_steps", "action_repeat"))
    env = make_env(TASKS[name].env_id, name, limit, repeat)
    rng = np.random.default_rng(seed)
    grid = np.array([list(row) for row in MAZES[name.partition("-")[2]].split()])
    start, goal = (tuple(map(int, np.argwhere(grid == letter)[0])) for letter in "rg")
    cells = [(int(row), int(col)) for row, col in np.argwhere(grid == "0")]
    rows = []
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=(seed * 1_000_003 + episode) % 2**31)
        target = cells[rng.integers(len(cells))] if rng.random() < 0.2 else goal
        path = []
        if rng.random() < 0.3:  # a detour: first to a random cell, then on to the target
            path = shortest_path(grid, start, cells[rng.integers(len(cells))], rng)
        path += shortest_path(grid, path[-1] if path else start, target, rng)
        # A cell is 1 m wide, and the middle of the map is the origin. The goal is known with its own noise.
        centers = [np.array([col + 0.5 - grid.shape[1] / 2, grid.shape[0] / 2 - row - 0.5]) for row, col in path]
        waypoints = [center + rng.uniform(-0.1, 0.1, 2) for center in centers]
        waypoints[-1] = obs[2:4] if target == goal else waypoints[-1]
        speed, noise, index, done = rng.uniform(1.2, 3.0), np.zeros(2), 0, False  # speed in m/s
        while not done:
            position, velocity = obs[4:6], obs[6:8]
            while index < len(waypoints) - 1 and np.linalg.norm(waypoints[index] - position) < 0.35:
                index += 1
            direction = waypoints[index] - position
            desired = direction * speed / max(float(np.linalg.norm(direction)), 0.5)
            noise = 0.8 * noise + 0.2 * rng.normal(0, 1, 2)
            action = np.clip(0.6 * (desired - velocity) + 0.6 * noise, -1, 1).astype(np.float32)
            next_obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            flags = terminated, truncated and not terminated, info["success"]
            rows.append((obs, action, np.float32(reward), next_obs, *flags))
            obs = next_obs
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "infos/success")
    return {key: np.array(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def shortest_path(grid: np.ndarray, start: tuple[int, ...], goal: tuple[int, ...], rng: np.random.Generator) -> list:
    """A shortest path of cells (row, column) from `start`, which is left out, to `goal`; ties are broken at random."""
    previous, queue = {start: start}, collections.deque([start])
    while queue:
        cell = queue.popleft()
        for row, col in rng.permutation([(0, 1), (1, 0), (0, -1), (-1, 0)]):
            neighbor = (cell[0] + int(row), cell[1] + int(col))
            if grid[neighbor] != "1" and neighbor not in previous:
                previous[neighbor] = cell
                queue.append(neighbor)
    path = [goal]
    while previous[path[0]] != start:
        path.insert(0, previous[path[0]])
    return path
