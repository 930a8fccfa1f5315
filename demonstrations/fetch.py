"""The controller of the demonstrations in fetch-pick-and-place: an arm brings a block to a goal in the air.

It comes from above or from a side, goes directly or by a detour, and has a speed of its own in every episode. The
actions carry correlated noise. About half of the episodes are late or clumsy.
"""

import gymnasium as gym
import numpy as np

from utils.fetch_env import MIDDLE

NUM_EPISODES = 50  # of the demonstrations


class Controller:
    """Brings the block to the goal in one episode. Observations are 22 wide, actions 4."""

    def __init__(self, env: gym.Env, obs: np.ndarray, rng: np.random.Generator):
        self.rng, self.phase, self.noise, self.target = rng, "approach", np.zeros(3), np.zeros(3)
        self.speed, beside, detour = rng.uniform(0.4, 0.95), rng.random() < 0.4, rng.random() < 0.4
        # Where the hand comes from, seen from the block, in metres. The fingers open to the two other sides.
        self.start = np.array([rng.choice([-0.09, 0.09]), 0, 0] if beside else [0, 0, rng.uniform(0.06, 0.12)])
        self.detour = detour * np.array([0, rng.choice([-1, 1]) * rng.uniform(0.04, 0.1), 0.06])

    def act(self, obs: np.ndarray) -> np.ndarray:
        to_block, to_goal = obs[3:6] / 10, obs[6:9] / 5  # from the hand, from the block
        block, distance = MIDDLE + obs[:3] / 5 + to_block, np.linalg.norm(to_block)
        if self.phase == "approach" and np.linalg.norm(to_block + self.start) < 0.03:
            self.phase = "reach"
        elif self.phase == "reach" and distance < 0.018:
            self.phase = "close"
        elif self.phase == "close" and self.rng.random() < 0.7:
            self.phase, self.target = "carry", block + self.detour
        elif self.phase == "carry" and distance > 0.05:  # the block is lost
            self.phase = "approach"
        if np.linalg.norm(self.target - block) < 0.03:
            self.target = block + to_goal
        way = {"approach": to_block + self.start, "carry": self.target - block}.get(self.phase, to_block)
        self.noise = 0.7 * self.noise + 0.3 * self.rng.normal(0, 1, 3)
        command = way * min(6, self.speed / max(np.abs(way).max(), 1e-6)) + 0.3 * self.noise  # .6 of the way; 1 is .1 m
        return np.append(command, self.rng.uniform(0.85, 0.95) * (-1 if self.phase in ("close", "carry") else 1))
