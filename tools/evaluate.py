"""Reloads the agent of a run, and prints its return, length and success.

python tools/evaluate.py RUN_DIR --episodes 50 --seed 1000 --video out.mp4
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import Parser, one_line_errors
from utils import InputError, reason
from utils.envs import make_env

SCRIPTS = {name: name for name in ("expo_diffusion", "expo_flow", "expo_finetune")}
SCRIPTS |= {name: f"baselines.{name}" for name in ("rlpd", "idql", "diffusion_ql", "qflow")}
SCRIPTS |= {name: f"variants.{name}" for name in ("expo_faster", "expo_chunks")}


def load_args(run_dir: Path) -> tuple[Any, Any]:
    """The module of a run's script, and the flags of the run."""
    try:
        record = json.loads((run_dir / "args.json").read_text())
        script, saved = record["script"], dict(record["args"])
        command = [word for start in record["starts"] for word in start["command"]]
    except FileNotFoundError:
        raise InputError(f"{run_dir} holds no run: args.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{run_dir / 'args.json'} is damaged, or not of a run of this project") from None
    if any(word.partition("=")[0] == "--change" for word in command):
        raise InputError(f"{run_dir} was made with a change of benchmark/ablation.py, which is not made here")
    if script not in SCRIPTS:
        raise InputError(f"{run_dir} is a run of {script!r}, which this project does not have")
    module = importlib.import_module(SCRIPTS[script])
    known = {field.name for field in dataclasses.fields(module.Args)}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items() if key in known}
    return module, module.Args(**values)


def load_agent(run_dir: Path, module: Any, args: Any, env: gym.Env, device: str) -> Any:
    """The agent of a run, from checkpoint.pt, or else from agent.pt: a run may have been made longer without it."""
    path = next((path for path in (run_dir / "checkpoint.pt", run_dir / "agent.pt") if path.exists()), None)
    if path is None:
        raise InputError(f"{run_dir} has neither agent.pt (--save-model writes it) nor checkpoint.pt")
    dims = [int(np.prod(space.shape or ())) for space in (env.observation_space, env.action_space)]
    try:
        state = torch.load(path, map_location=device, weights_only=True)  # tensors and plain values, no code
        agent = module.Agent(*dims, args).to(device)
        agent.load_state_dict(state["agent"])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path} is damaged, or does not fit its args.json ({reason(error)})") from None
    return agent.eval()


def evaluate(run_dir: Path, episodes: int, num_envs: int, seed: int, device: str, video: Path | None) -> None:
    module, args = load_args(run_dir)
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no CUDA here")
    args.eval_episodes, args.seed, args.device = episodes, seed, device
    flags = (args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys)
    envs = [make_env(*flags) for _ in range(min(episodes, num_envs))]
    agent = load_agent(run_dir, module, args, envs[0], device)
    metrics = module.evaluate({"eval/": agent}, envs, args, torch.device(device))
    for env in envs:
        env.close()
    print(f"{run_dir}: {episodes} episodes")
    for name in ("return", "length", "success_rate", "solved_share"):
        if f"eval/{name}" in metrics:
            print(f"  {name:<12}  {metrics[f'eval/{name}']:.4g}")
    if video:
        write_video(video, agent, make_env(*flags, render_mode="rgb_array"), seed, device)
        print(f"  video         {video}")


@torch.no_grad()
def write_video(path: Path, agent: Any, env: gym.Env, seed: int, device: str) -> None:
    """One episode as an mp4."""
    if not importlib.util.find_spec("moviepy"):
        raise InputError("--video needs a package: pip install moviepy")
    with tempfile.TemporaryDirectory() as folder:
        env = gym.wrappers.RecordVideo(env, f"{folder}/new", name_prefix="video", disable_logger=True)
        obs, done = env.reset(seed=seed)[0], False
        while not done:
            actions = agent(torch.as_tensor(obs, device=device).unsqueeze(0)).cpu().numpy()
            for action in actions.reshape(-1, *(env.action_space.shape or ())):  # one, or a chunk of several
                obs, _, terminated, truncated, _ = env.step(action)
                if done := terminated or truncated:
                    break
        env.close()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(next(Path(folder, "new").glob("*.mp4")).read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror})") from None


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--num-envs", type=int, default=20, help="environments at the same time; 1 for a robot")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--video", type=Path, help="also write one episode to this mp4")
    args = parser.parse_args()
    if min(args.episodes, args.num_envs) < 1 or not 0 <= args.seed < 2**31:
        raise InputError("--episodes and --num-envs must be at least 1, and --seed from 0 to 2147483647")
    evaluate(args.run_dir, args.episodes, args.num_envs, args.seed, args.device, args.video)


if __name__ == "__main__":
    one_line_errors(main)
