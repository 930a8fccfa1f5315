"""An arm lifts a block: gymnasium-robotics' FetchPickAndPlace with unit-sized observations and goals in the air."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import WrapperSpec

MIDDLE = np.array([1.34, 0.75, 0.425])  # metres: the middle of all blocks at the start, which lie on the table


class PickAndPlace(gym.Wrapper):
    """The goal is always in the air. The reward is 1 at the goal, which ends the episode, else 0.

    Observation (22,), numbers near 1: hand from MIDDLE (3), block from hand (3), goal from block (3), fingers' opening,
    rotation of block (3), velocities of block from hand (3), of hand (3) and of fingers, heights of block and hand.
    Action (4,): where the hand goes (3), and whether the fingers open (1) or close (-1).
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (22,), np.float64)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        arm: Any = self.unwrapped  # half of its own goals are on the table, where pushing is enough
        arm.goal = MIDDLE + arm.np_random.uniform([-0.15, -0.15, 0.1], [0.15, 0.15, 0.4])
        return unit_size(obs["observation"], arm.goal), info

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(action)
        success = bool(info["is_success"])  # the block is within 5 cm of the goal
        return unit_size(obs["observation"], obs["desired_goal"]), float(success), success, truncated, info


def unit_size(state: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The observation; metres, and metres per step of the simulator, are far below 1. The block's spin is left out."""
    hand, block, fingers, rotation, velocities = state[:3], state[3:6], state[9:11], state[11:14], state[14:25]
    places = 5 * (hand - MIDDLE), 10 * (block - hand), 5 * (goal - block), [20 * fingers.sum()], rotation
    moves = 30 * velocities[:3], 30 * velocities[6:9], [100 * velocities[9:].sum()], 10 * (state[[5, 2]] - MIDDLE[2])
    return np.concatenate([*places, *moves])


_entry = "gymnasium_robotics.envs.fetch.pick_and_place:MujocoFetchPickAndPlaceEnv"
_wrapper = WrapperSpec("PickAndPlace", f"{__name__}:PickAndPlace", {})
gym.register("expo/FetchPickAndPlace-v1", _entry, max_episode_steps=50, additional_wrappers=(_wrapper,))
