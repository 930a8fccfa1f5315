"""Evaluation in lockstep over a few environments, and `python -m utils.evaluate RUN_DIR` for a saved agent."""

import contextlib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import tyro

from utils.checkpoint import load_tensors, stop_if_asked
from utils.envs import success_of
from utils.errors import InputError, exit_on_input_error
from utils.logger import Logger, read_record
from utils.tasks import make_task_env

SCRIPTS = ("expo_diffusion", "expo_flow", "expo_finetune", "baselines.rlpd", "baselines.idql", "baselines.diffusion_ql")

Policy = Callable[[torch.Tensor], torch.Tensor]  # observations (n, O) -> actions (n, A)


@dataclass
class Episodes:
    """Results of n episodes: returns (n,), lengths (n,), success (n,) bool or None, frames of the first episode if they
    were recorded, and the observations (length, O) of every episode."""

    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray | None
    frames: list[np.ndarray]
    paths: list[np.ndarray]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean return, mean length in actions and, where the environment tells, share of successes."""
        values = {"return": self.returns.mean(), "length": self.lengths.mean()}
        if self.success is not None:
            values = {"success_rate": self.success.mean(), **values}
        return {prefix + key: float(value) for key, value in values.items()}


@torch.no_grad()
def evaluate(
    act: Policy,
    envs: list[gym.Env],
    num_episodes: int,
    seed: int,
    device: torch.device | str = "cpu",
    record: bool = False,
) -> Episodes:
    """Runs episodes with the policy `act`, several environments in lockstep so that one call serves them all.

    Torch's random state is put back afterwards: evaluation does not disturb training.

    Args:
        act: maps observations (n, O) on `device` to actions (n, A) in [-1, 1].
        envs: environments to use side by side; the result depends on their number only through the policy's noise.
        num_episodes: how many episodes; episode i resets with `seed + i`.
        seed: also seeds the policy's own noise.
        record: keep the first environment's frames (it must have been made with `render=True`).
    """
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, int)
    success: list[bool | None] = [None] * num_episodes
    frames, paths = [], [[] for _ in range(num_episodes)]
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for first in range(0, num_episodes, len(envs)):
            active = list(range(first, min(first + len(envs), num_episodes)))
            obs = [envs[i - first].reset(seed=seed + i)[0] for i in active]
            obs += [obs[0]] * (len(envs) - len(obs))
            while active:
                stop_if_asked()
                # Always as many rows as environments, those of ended episodes too: one shape, to compile for once.
                actions = act(torch.as_tensor(np.stack(obs), device=device)).cpu().numpy()
                for i in list(active):
                    env, action = envs[i - first], actions[i - first]
                    paths[i].append(obs[i - first])
                    if record and i == 0:
                        frames.append(env.render())
                    obs[i - first], reward, terminated, truncated, info = env.step(action)
                    returns[i] += float(reward)
                    lengths[i] += 1
                    reached = success_of(info)
                    if reached is not None:
                        success[i] = bool(success[i]) or reached
                    if terminated or truncated:
                        active.remove(i)
    known = None if any(s is None for s in success) else np.array(success, bool)
    return Episodes(returns, lengths, known, frames, [np.array(path) for path in paths])


class Evaluation:
    """The evaluations of one run: each is one row of its log, and a video if `args.capture_video` is set.

    Args:
        args: the script's flags; episodes have seeds of their own, the same at every evaluation.
        device: of the policies.
    """

    def __init__(self, args: Any, device: torch.device):
        self.args, self.device = args, device
        self.seed = args.seed + 1_000_000
        self.envs = [make_task_env(args) for _ in range(min(args.eval_episodes, 20))]
        self.video_env = make_task_env(args, render=True) if args.capture_video else None

    def run(self, logger: Logger, step: int, act: Policy, base: Policy | None = None) -> None:
        """Logs return and success of the policy `act` and, if it is given, of the base policy alone."""
        metrics = self._episodes(act).metrics("eval/")
        if base is not None:
            metrics |= self._episodes(base).metrics("eval/base_")
        if self.video_env is not None:
            video = evaluate(act, [self.video_env], 1, self.seed, self.device, record=True)
            write_video(logger.run_dir / "videos" / f"step{step}.mp4", video.frames)
        logger.write_evaluation(step, metrics)

    def _episodes(self, policy: Policy) -> Episodes:
        return evaluate(policy, self.envs, self.args.eval_episodes, self.seed, self.device)


def write_video(path: Path, frames: list[np.ndarray], fps: int = 20) -> None:
    """Writes `frames` (each (H, W, 3) uint8) as an mp4."""
    import imageio.v2 as imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, fps=fps, macro_block_size=2) as writer:
        for frame in frames:
            writer.append_data(frame)  # pyright: ignore[reportAttributeAccessIssue]


def load_agent(run_dir: Path, device: str = "cpu") -> tuple[Any, Any]:
    """The saved agent of a run (`agent(obs)` acts) and its args.

    Raises:
        InputError: no run there, no saved agent, or one that does not fit its own args.
    """
    record = read_record(run_dir)
    script, values = record["script"], record["args"]
    if script not in SCRIPTS:
        raise InputError(f"{run_dir} is a run of {script!r}, which this project does not have")
    module = importlib.import_module(script)
    known = {field.name for field in fields(module.Args)}
    args = module.Args(**{key: value for key, value in values.items() if key in known})
    state = load_state(run_dir / "agent.pt", device)
    agent = module.Agent(state["obs_dim"], state["action_dim"], args).to(device)
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise InputError(
            f"{run_dir / 'agent.pt'} does not fit its args.json: {str(error).splitlines()[-1].strip()}"
        ) from None
    return agent, args


def load_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """A file of `Logger.save`; it can hold tensors and plain values only, no code (`weights_only=True`)."""
    try:
        state = load_tensors(path, device)
        return {key: state[key] for key in ("agent", "obs_dim", "action_dim")}
    except FileNotFoundError:
        raise InputError(f"{path} is missing: was the run made with --save-model?") from None
    except KeyError:
        raise InputError(f"{path} is damaged, or is not an agent saved by this project") from None


def load_base_policy(agent: Any, args: Any) -> None:
    """Copies base policy and its average from the run `args.pretrained` (its folder, or its agent.pt) into `agent`.

    Does nothing without that flag, or where `args.resume` brings a whole agent.

    Raises:
        InputError: names the flags or the shapes that differ, or says what is wrong with the file.
    """
    if not args.pretrained or args.resume:
        return
    path = Path(args.pretrained) / "agent.pt" if Path(args.pretrained).is_dir() else Path(args.pretrained)
    saved = load_state(path)["agent"]
    parts = ("base_policy.", "target_base_policy.")
    here = {key: value for key, value in agent.state_dict().items() if key.startswith(parts)}
    there = {key: value for key, value in saved.items() if key.startswith(parts)}
    if not there:
        raise InputError(f"--pretrained {path}: that agent has no base policy")
    wrong = [key for key in here if key not in there or here[key].shape != there[key].shape]
    wrong += [key for key in there if key not in here]
    if wrong:
        with contextlib.suppress(OSError, ValueError, KeyError):  # of a lone agent.pt: shapes have to do
            flags = json.loads((path.parent / "args.json").read_text())["args"]
            names = ("base_hidden_dim", "base_blocks", "base_expansion", "denoising_steps", "task")
            differ = [n for n in names if n in flags and flags[n] != getattr(agent.args, n)]
            if differ:
                listed = ", ".join(
                    f"--{n.replace('_', '-')} {flags[n]} (here {getattr(agent.args, n)})" for n in differ
                )
                raise InputError(f"--pretrained {path} was made with {listed}; give the same flags")
        shapes = [tuple(state[wrong[0]].shape) if wrong[0] in state else "absent" for state in (there, here)]
        raise InputError(
            f"--pretrained {path} is another base policy: {wrong[0]} is {shapes[0]} there, {shapes[1]} here"
        )
    agent.load_state_dict(there, strict=False)


def main(
    run_dir: Annotated[Path, tyro.conf.Positional], episodes: int = 50, seed: int = 1000, video: Path | None = None
) -> None:
    """Reloads a saved agent and prints return and success.

    Args:
        run_dir: folder of a run made with --save-model.
        episodes: how many episodes.
        seed: of the first episode; episode i uses seed + i.
        video: write the first episode to this mp4.
    """
    agent, args = load_agent(run_dir)
    envs = [make_task_env(args, render=video is not None) for _ in range(1 if video else min(episodes, 10))]
    result = evaluate(agent, envs, episodes, seed, record=video is not None)
    print(f"{run_dir}: {episodes} episodes")
    print(f"  return   {result.returns.mean():.2f} +- {result.returns.std():.2f} (mean, standard deviation)")
    print(f"  length   {result.lengths.mean():.1f}")
    if result.success is not None:
        print(f"  success  {result.success.mean():.3f} ({int(result.success.sum())} of {episodes})")
    if video:
        write_video(video, result.frames)
        print(f"  video    {video}")


if __name__ == "__main__":
    with exit_on_input_error():
        tyro.cli(main)
