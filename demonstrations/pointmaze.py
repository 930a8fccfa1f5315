"""The controller of the quickstart's demonstrations in gymnasium-robotics' PointMaze.

It walks shortest paths between the centres of cells. Sometimes it makes a detour, or walks to another cell and stops
there. Every episode has a speed of its own, and the actions carry correlated noise.
"""

import collections
from typing import Any

import gymnasium as gym
import numpy as np

NUM_EPISODES = 60  # of the demonstrations


class Controller:
    """Walks through one episode. Observations are 8 wide, actions 2."""

    def __init__(self, env: gym.Env, obs: np.ndarray, rng: np.random.Generator):
        point: Any = env.unwrapped
        grid = np.array([[str(cell) for cell in row] for row in point.maze.maze_map])
        start, goal = (tuple(map(int, np.argwhere(grid == letter)[0])) for letter in "rg")
        cells = [(int(row), int(col)) for row, col in np.argwhere(grid == "0")]
        target = cells[rng.integers(len(cells))] if rng.random() < 0.2 else goal
        path = []
        if rng.random() < 0.3:  # a detour: first to a random cell, then on to the target
            path = shortest_path(grid, start, cells[rng.integers(len(cells))], rng)
        path += shortest_path(grid, path[-1] if path else start, target, rng)
        # A cell is 1 m wide, and the middle of the map is the origin. The goal is known with its own noise.
        centers = [np.array([col + 0.5 - grid.shape[1] / 2, grid.shape[0] / 2 - row - 0.5]) for row, col in path]
        self.waypoints = [center + rng.uniform(-0.1, 0.1, 2) for center in centers]
        self.waypoints[-1] = obs[2:4] if target == goal else self.waypoints[-1]
        self.speed, self.noise, self.rng = rng.uniform(1.2, 3.0), np.zeros(2), rng  # speed in m/s

    def act(self, obs: np.ndarray) -> np.ndarray:
        position, velocity = obs[4:6], obs[6:8]
        while len(self.waypoints) > 1 and np.linalg.norm(self.waypoints[0] - position) < 0.35:
            del self.waypoints[0]
        direction = self.waypoints[0] - position
        desired = direction * self.speed / max(float(np.linalg.norm(direction)), 0.5)
        self.noise = 0.8 * self.noise + 0.2 * self.rng.normal(0, 1, 2)
        return 0.6 * (desired - velocity) + 0.6 * self.noise


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
