"""The quickstart's maze (gymnasium-robotics PointMaze on MuJoCo) and its generated offline data.

Nothing is downloaded: a waypoint controller produces the demonstrations in seconds. It walks shortest paths between
cell centres with random tie-breaks, sometimes makes a detour, has a speed of its own in every episode, its actions
carry correlated noise, and in a share of the episodes it walks to another cell and stops there. What keeps imitation
from solving the task is the time limit, which lies near the demonstrators' own speed.
"""

import collections

import gymnasium as gym
import numpy as np

MAPS = {  # 1 wall, r start, g goal: one of each, so that every episode is the same errand with noise on both ends
    "umaze": ("11111", "1r001", "11101", "1g001", "11111"),
    "medium": ("11111111", "1r011001", "10010001", "11000111", "10010001", "10100101", "100010g1", "11111111"),
    "large": (
        "111111111111",
        "1r0001000001",
        "101101010101",
        "100000010001",
        "101111011101",
        "100101000001",
        "110101010111",
        "100100010g01",
        "111111111111",
    ),
}

SPEED = (1.2, 3.0)  # metres per second, drawn once per episode


def maze_map(name: str) -> list[list[int | str]]:
    """The map `name` in gymnasium-robotics' form: rows of 0, 1, "r" and "g"."""
    return [[int(c) if c in "01" else c for c in row] for row in MAPS[name]]


def cell_center(cell: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Position (x, y) in metres of the middle of `cell` (row, column); a cell is 1 m, the map's middle the origin."""
    return np.array([cell[1] + 0.5 - shape[1] / 2, shape[0] / 2 - cell[0] - 0.5])


def shortest_path(free: np.ndarray, start: tuple[int, int], goal: tuple[int, int], rng: np.random.Generator):
    """A shortest path of cells from `start` (excluded) to `goal`, ties broken at random; `free` (rows, columns)."""
    previous: dict[tuple[int, int], tuple[int, int]] = {start: start}
    queue = collections.deque([start])
    while queue:
        cell = queue.popleft()
        for row, col in rng.permutation([(0, 1), (1, 0), (0, -1), (-1, 0)]):
            neighbor = (cell[0] + int(row), cell[1] + int(col))
            if free[neighbor] and neighbor not in previous:
                previous[neighbor] = cell
                queue.append(neighbor)
    path = [goal]
    while previous[path[-1]] != start:
        path.append(previous[path[-1]])
    return path[::-1]


def generate(env: gym.Env, maze: str, num_episodes: int, seed: int) -> dict[str, np.ndarray]:
    """Demonstrations as D4RL-layout arrays.

    Args:
        env: the task's environment as `utils.envs.make_env` makes it (flat observations, actions in [-1, 1]).
        maze: name of the map.
        num_episodes: how many episodes.
        seed: of the controller and of the environment's resets; the same seed gives the same arrays.

    Returns:
        observations (n, 8), actions (n, 2), rewards (n,), next_observations (n, 8), terminals (n,), timeouts (n,) and
        infos/success (n,), float32 and bool.
    """
    rng = np.random.default_rng(seed)
    grid = np.array([list(row) for row in MAPS[maze]])
    free = grid != "1"
    start, goal = ((int(row), int(col)) for row, col in (np.argwhere(grid == letter)[0] for letter in "rg"))
    cells = [(int(row), int(col)) for row, col in np.argwhere(free) if (row, col) not in (start, goal)]
    rows = collections.defaultdict(list)
    for episode in range(num_episodes):
        obs, _ = env.reset(seed=seed * 1_000_003 + episode)
        target = cells[rng.integers(len(cells))] if rng.random() < 0.2 else goal
        path = []
        if rng.random() < 0.3:  # a detour: first to a random cell, then on to the target
            path = shortest_path(free, start, cells[rng.integers(len(cells))], rng)
        path += shortest_path(free, path[-1] if path else start, target, rng)
        waypoints = [cell_center(cell, grid.shape) + rng.uniform(-0.1, 0.1, 2) for cell in path]
        if target == goal:
            waypoints[-1] = obs[2:4]  # the goal itself, position noise included
        speed, noise, index, done = rng.uniform(*SPEED), np.zeros(2), 0, False
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
            for key, value in {
                "observations": obs,
                "actions": action,
                "rewards": np.float32(reward),
                "next_observations": next_obs,
                "terminals": terminated,
                "timeouts": truncated and not terminated,
                "infos/success": bool(info["success"]),
            }.items():
                rows[key].append(value)
            obs = next_obs
    return {key: np.array(values) for key, values in rows.items()}
