"""OGBench's single-task environments, which give rewards to the rows of its play data (requirements-ogbench.txt)."""

import warnings
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from utils import InputError
from utils.arrays import Arrays

warnings.filterwarnings("ignore", ".*precision lowered by casting", UserWarning)  # when the package makes a space


class SingleTask(gym.Wrapper):
    """An OGBench environment that relabels play data for its own task."""

    def __init__(self, env: gym.Env, name: str):
        super().__init__(env)
        self.name = name
        # The package makes its spaces anew whenever they are asked for: here that would be at every step.
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def close(self) -> None:
        """Frees the renderer too. The package leaves it to the end of the process, when it is too late."""
        if (renderer := getattr(self.env.unwrapped, "_renderer", None)) is not None:
            renderer.close()
        super().close()

    def relabel_rows(self, arrays: Arrays) -> Arrays:
        """Rewards, terminals and success of this task, from the states in the file, by the package's own rule."""
        from ogbench.relabel_utils import relabel_dataset  # pyright: ignore[reportMissingImports]

        data = {key: arrays[key] for key in ("qpos", "qvel", "button_states") if key in arrays}
        for key in ("qpos",) if "cube" in self.name else ("qpos", "button_states"):
            if key not in data:
                raise InputError(f"the data has no {key!r}, which the rewards of {self.name} are made from")
        width = self.get_wrapper_attr("model").nq
        if data["qpos"].shape[1:] != (width,):
            raise InputError(f"'qpos' has shape {data['qpos'].shape}; {self.name} has {width} coordinates")
        relabel_dataset(self.name, self.env, data)
        done = data["masks"] == 0
        return arrays | {"rewards": data["rewards"], "terminals": done, "infos/success": done}


def make(name: str, render_mode: str | None = None) -> gym.Env:
    import ogbench  # noqa: F401  # pyright: ignore[reportMissingImports]

    create: Any = load_env_creator(str(gym.spec(name).entry_point))
    return SingleTask(create(**gym.spec(name).kwargs, render_mode=render_mode), name)


for _name, _limit in (("cube-single", 200), ("cube-double", 500), ("scene", 750), ("puzzle-3x3", 500)):
    _id = f"expo/OGBench{''.join(word.capitalize() for word in _name.split('-'))}-v0"
    gym.register(_id, f"{__name__}:make", max_episode_steps=_limit, kwargs={"name": f"{_name}-singletask-v0"})
