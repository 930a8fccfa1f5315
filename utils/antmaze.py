"""D4RL's AntMaze on current MuJoCo, so that D4RL's rows and the simulator agree.

gymnasium-robotics' AntMaze has another ant, another origin, and goals that move: D4RL's rows do not fit it. Here
Gymnasium's own ant.xml is edited in memory: the time step is .02, contacts are softer (solref and solimp), the motors
have gear 1 and +-30 N m, and walls stand around the ant. `tools/data.py replay` measures how well a file's rows fit.
"""

import importlib
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import gymnasium.envs.mujoco.mujoco_env as gymnasium_mujoco
import numpy as np
from gymnasium import spaces

from utils import InputError
from utils.arrays import Arrays
from utils.tasks import MAZES

mujoco: Any = importlib.import_module("mujoco")  # its compiled part has no types
CELL = 4.0  # metres
MAX_TORQUE = 30.0  # N m per motor, at action +-1
GOAL_RADIUS = 0.5  # metres


def grid(maze: str) -> np.ndarray:
    """The map as letters (rows, columns)."""
    return np.array([list(row) for row in MAZES[maze].split()])


def positions(maze: str, letter: str) -> np.ndarray:
    """Positions (cells, 2) in metres of the cells with this letter; the start cell is the origin."""
    start, cells = (np.argwhere(grid(maze) == which) for which in ("r", letter))
    return CELL * (cells - start[0])[:, ::-1].astype(float)


def make_model(maze: str, render_size: int = 480) -> Any:
    """D4RL's ant between the walls of `maze`; goal and walls are drawn, only the walls collide."""
    spec = mujoco.MjSpec.from_file(str(Path(gymnasium_mujoco.__file__).parent / "assets" / "ant.xml"))
    spec.option.timestep = 0.02
    floor = next(geom for geom in spec.geoms if geom.name == "floor")
    side = 2 * CELL * grid(maze).shape[1]
    floor.size, floor.material, floor.rgba = [side, side, CELL], "", [0.6, 0.6, 0.55, 1]
    for x, y in positions(maze, "1"):
        wall = spec.worldbody.add_geom()
        wall.type, wall.size, wall.pos = mujoco.mjtGeom.mjGEOM_BOX, [CELL / 2, CELL / 2, 1], [x, y, 1]
        wall.contype, wall.conaffinity, wall.rgba = 1, 1, [0.3, 0.33, 0.45, 1]
    for geom in spec.geoms:
        geom.solref, geom.solimp[:3] = [0.02, 1], [0.8, 0.8, 0.01]
    for motor in spec.actuators:
        motor.gear, motor.ctrlrange = [1, 0, 0, 0, 0, 0], [-MAX_TORQUE, MAX_TORQUE]
    goal = spec.worldbody.add_site()
    goal.name, goal.type = "goal", mujoco.mjtGeom.mjGEOM_CYLINDER
    goal.size, goal.rgba = [GOAL_RADIUS, 0.5, 0], [0.9, 0.2, 0.2, 1]
    goal.pos = [*positions(maze, "g")[0], 0]  # not 0: MuJoCo would fix it to the world's origin
    model = spec.compile()
    model.vis.global_.offwidth = model.vis.global_.offheight = render_size
    return model


class AntMaze(gymnasium_mujoco.MujocoEnv):
    """An ant that walks to a goal it is not shown, because it is (nearly) the same in every episode.

    Observation (29,): torso position (3) and orientation (4), 8 joint angles, 6 + 8 velocities. Action (8,): torques,
    as shares of 30 N m, for .1 s. The reward is 1 at the goal, which ends the episode, else 0. A fall ends nothing.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 10}

    def __init__(self, maze: str, render_mode: str | None = None):
        self.maze, self.goal = maze, np.zeros(2)
        walls = positions(maze, "1")
        camera: dict[str, Any] = {"distance": 1.1 * CELL * max(grid(maze).shape), "elevation": -80, "azimuth": 90}
        camera["lookat"] = np.array([*(walls.min(axis=0) + walls.max(axis=0)) / 2, 0])  # the middle of the maze
        space = spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", 5, space, render_mode, default_camera_config=camera)  # 5 steps of .02 s per action
        self.action_space = spaces.Box(-1, 1, (8,), np.float32)

    def _initialize_simulation(self) -> tuple[Any, Any]:
        return (model := make_model(self.maze, self.width)), mujoco.MjData(model)

    def step(self, action):
        self.do_simulation(MAX_TORQUE * np.clip(action, -1, 1), self.frame_skip)
        success = bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= GOAL_RADIUS)
        return self.state_vector(), float(success), success, False, {"success": success}

    def reset_model(self) -> np.ndarray:
        self.goal = positions(self.maze, "g")[0] + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        self.model.site("goal").pos[:2] = self.goal
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        self.set_state(qpos, self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv))
        return self.state_vector()

    def relabel_rows(self, arrays: Arrays) -> Arrays:
        """D4RL's rows as they are; the file's terminals are its successes."""
        if arrays["rewards"].min() < 0:
            raise InputError("AntMaze rewards below 0: D4RL's are 0 and 1, and the task itself shifts them by -1")
        return arrays | {"infos/success": arrays["terminals"].astype(bool)}


for _name, _limit in (("UMaze", 700), ("Medium", 1000), ("Large", 1000)):
    _id, _kwargs = f"expo/AntMaze{_name}-v2", {"maze": _name.lower()}
    gym.register(_id, f"{__name__}:AntMaze", max_episode_steps=_limit, kwargs=_kwargs)
