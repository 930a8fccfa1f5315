"""robomimic's tasks (lift, can, square) on robosuite 1.5, with the observations that robomimic's files store.

It needs a virtual environment of its own (docs/data.md). The package mimicgen adds its tasks. The first success has
reward 1 and ends the episode, because demonstrations stop soon after it; else the reward is 0. An action lasts .05 s.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from utils import InputError
from utils.arrays import Arrays
from utils.tasks import OBS_KEYS


class Robosuite(gym.Env):
    """A Panda arm, moved by changes of its hand's pose: action (7,) is position, rotation and gripper."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, name: str, obs_keys: Sequence[str] = OBS_KEYS, render_mode: str | None = None):
        logging.disable(logging.WARNING)  # robosuite's hints about its own settings
        if name.endswith("_D0"):
            import mimicgen  # noqa: F401  # pyright: ignore[reportMissingImports]
        import robosuite  # pyright: ignore[reportMissingImports]
        from robosuite.controllers import load_composite_controller_config  # pyright: ignore[reportMissingImports]

        self.name, self.obs_keys, self.render_mode = name, tuple(obs_keys), render_mode
        controller = load_composite_controller_config(robot="Panda")
        self.arm = controller["body_parts"]["right"]
        options = dict(robots="Panda", controller_configs=controller, control_freq=20, reward_shaping=False)
        options |= dict(use_camera_obs=False, has_renderer=False, has_offscreen_renderer=render_mode is not None)
        self.env: Any = robosuite.make(name, ignore_done=True, **options)  # the time limit is Gymnasium's
        logging.disable(logging.NOTSET)
        self.action_space = spaces.Box(*(bound.astype(np.float32) for bound in self.env.action_spec))
        self.observation_space = spaces.Box(-np.inf, np.inf, self._observation(self.env.reset()).shape, np.float64)

    def _observation(self, parts: Arrays) -> np.ndarray:
        """The chosen keys side by side; robomimic calls robosuite's "object-state" plain "object"."""
        parts = {**parts, "object": parts["object-state"]}
        for key in self.obs_keys:
            if key not in parts:
                raise InputError(f"robosuite has no observation {key!r}; --obs-keys are: {', '.join(sorted(parts))}")
        return np.concatenate([np.atleast_1d(parts[key]) for key in self.obs_keys])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.rng = np.random.default_rng(seed)
            self.env.placement_initializer = None  # else it keeps a generator of its own
        return self._observation(self.env.reset()), {}

    def step(self, action):
        parts, _, _, _ = self.env.step(action)
        success = bool(self.env._check_success())
        return self._observation(parts), float(success), success, False, {"success": success}

    def render(self):
        """The front camera's picture (512, 512, 3) uint8; robosuite's rows run upwards."""
        return self.env.sim.render(width=512, height=512, camera_name="frontview")[::-1]

    def close(self) -> None:
        self.env.close()

    def check_recording(self, env_args: dict[str, Any]) -> None:
        """Raises InputError where a robomimic file's `env_args` say that its actions or rewards mean another thing."""
        settings = env_args.get("env_kwargs") or {}
        controller = settings.get("controller_configs") or {}
        arm = (controller.get("body_parts") or {}).get("right") or controller  # robosuite 1.5, or before
        recorded = arm | settings | {"env_name": env_args.get("env_name", self.name)}
        here = self.arm | dict(env_name=self.name, robots="Panda", gripper_types="default", control_freq=20)
        here |= dict(reward_shaping=False, control_delta=True)
        del here["input_ref_frame"]  # "base" and "world" are the same for this arm
        for key, value in here.items():
            if recorded.get(key, value) not in (value, [value]):
                raise InputError(f"it was recorded with {key} {recorded[key]}; the task has {value}")

    def relabel_rows(self, arrays: Arrays) -> Arrays:
        """Demonstrations up to their first success, which is terminal; what follows it cannot happen here."""
        success, ends = arrays["infos/success"], arrays["ends"]
        before = np.cumsum(success) - success  # successes before this row, those of earlier episodes included
        starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
        keep = before == np.repeat(before[starts], np.diff([*starts, len(ends)]))
        arrays = arrays | {"rewards": success.astype(np.float32), "terminals": success, "ends": ends | success}
        return {key: value[keep] for key, value in arrays.items()}


for _id, _name, _limit in (
    ("RobomimicLift", "Lift", 400),
    ("RobomimicCan", "PickPlaceCan", 400),
    ("RobomimicSquare", "NutAssemblySquare", 400),
    ("MimicGenStack", "Stack_D0", 200),
    ("MimicGenThreading", "Threading_D0", 400),
):
    gym.register(f"expo/{_id}-v1", f"{__name__}:Robosuite", max_episode_steps=_limit, kwargs={"name": _name})
