"""The binary Adroit tasks (pen, door, relocate, hammer) on gymnasium-robotics' hand.

The reward is 1 if the goal is reached after the step, else 0. Only the time limit ends an episode, so a success can be
lost again. gymnasium-robotics' own dense rewards have a term with the wrong sign in door, relocate and hammer.
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import WrapperSpec

from utils.arrays import Arrays


def success_after(name: str, obs: np.ndarray) -> np.ndarray:
    """Whether the goal is reached in the states with observations (n, O): the simulator's own rule, read off `obs`."""
    if name == "pen":  # pen near the target's place and parallel to it
        return (np.linalg.norm(obs[:, 39:42], axis=1) < 0.075) & ((obs[:, 33:36] * obs[:, 36:39]).sum(axis=1) > 0.95)
    if name == "door":  # hinge angle
        return obs[:, 28] >= 1.35
    if name == "relocate":  # ball near the target
        return np.linalg.norm(obs[:, 36:39], axis=1) < 0.1
    return np.abs(0.091 - obs[:, 26]) < 0.01  # hammer: the nail's way into the board, in metres


class AdroitBinary(gym.Wrapper):
    """gymnasium-robotics' AdroitHand environment with reward = success and no end but the time limit."""

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name

    def step(self, action):
        obs, _, _, truncated, info = self.env.step(action)
        return obs, float(info["success"]), False, truncated, info

    def relabel_rows(self, arrays: Arrays) -> Arrays:
        """D4RL's arrays with this task's rewards: success after the row's step, recomputed where the file lacks it.

        A dropped pen ends D4RL's episode, but not ours: with rewards of -1 that would pay. Such rows end by time here.
        """
        obs, success = arrays["observations"], arrays.get("infos/success")
        if obs.shape[1:] != self.observation_space.shape:
            return arrays  # of another task; the check against the environment says so
        if success is None and "next_observations" in arrays:
            success = success_after(self.name, arrays["next_observations"])
        elif success is None:
            before = success_after(self.name, obs)
            success = np.where(arrays["ends"], before, np.roll(before, -1))  # a row without successor: its own state
        rewards, never = success.astype(np.float32), np.zeros(len(obs), bool)
        return arrays | {"rewards": rewards, "infos/success": success, "terminals": never}


for _name, _limit in (("Pen", 100), ("Door", 200), ("Relocate", 200), ("Hammer", 200)):
    _entry = f"gymnasium_robotics.envs.adroit_hand.adroit_{_name.lower()}:AdroitHand{_name}Env"
    _binary = (WrapperSpec("AdroitBinary", f"{__name__}:AdroitBinary", {"name": _name.lower()}),)
    gym.register(f"expo/Adroit{_name}Binary-v1", _entry, max_episode_steps=_limit, additional_wrappers=_binary)
