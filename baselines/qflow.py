"""Q-Flow, a baseline: a flow policy whose velocity is steered by the value of the points on its way, in one file.

Paper: Q-Flow: Stable and Expressive Reinforcement Learning with Flow-Based Policy (ICML 2026), arXiv 2605.13435. It is
[paper] below; [paper Sec. 5] and [code] stand in definitions shared with EXPO and mean EXPO's. [ours 4] is explained in
docs/expo_diffusion.md, and every [ours q...] in docs/qflow.md.

    python baselines/qflow.py                                   # the same maze as expo_diffusion.py
    python baselines/qflow.py --task pointmaze-large --seed 1   # another task; add --help to see its settings
    python baselines/qflow.py --env-id Pusher-v5 --dataset my_data.hdf5

The idea: a flow has no randomness after its first noise. So a point x at time t of the flow becomes one certain
action, and it has the value of that action. The *inner value* V(s, x, t) learns this value. The policy imitates the
velocity from noise to the data's action, plus the gradient of V in x. So the velocity turns towards higher value. No
gradient goes through the chain of Euler steps.

How it differs from rlpd.py: a flow policy in place of the Gaussian actor, and the inner value. There is no entropy.
One Adam steps all networks at once, for each of the U slices. The networks have GELU. Buffer, symmetric batches, UTD
and the loop are the same. Training and evaluation both take one sample of the policy.

Shapes: B batch, O observation, A action, E critics and inner values, K Euler steps from noise to action, U updates per
environment step (UTD).
"""

import copy
import importlib
import io
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds utils/ from `python baselines/qflow.py`

from utils.data import load_dataset
from utils.envs import make_env
from utils.tasks import parse_args


@dataclass
class Args:
    # These values are Q-Flow's; U and both offline_* are EXPO's. A --task, also the default one, lays its settings over
    # them (utils/tasks.py). `--task ""`, or --env-id without --task, runs with these values. A flag you give wins.
    # ---- the run
    task: str = "pointmaze-medium"  # environment, data and settings in one word; `python tools/data.py list` shows all
    env_id: str = ""  # your own environment, a Gymnasium id; it needs --dataset, and no --task (or --task laptop)
    dataset: tuple[str, ...] = ()  # offline data: files, or words such as d4rl:NAME (docs/data.md); several are joined
    obs_keys: tuple[str, ...] = ()  # robomimic's observations to use, in this order; other data ignores it
    seed: int = 1  # seeds networks, exploration, batches, resets and evaluation
    total_timesteps: int = 300_000  # environment steps
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    threads: int = 0  # CPU threads of torch; 0: torch chooses
    compile: bool = False  # torch.compile: can be faster, the same numbers up to rounding; first use takes a minute
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # lower: faster products (docs/performance.md)
    run_dir: str = ""  # folder of the run; default: runs/<task>__<script>__<seed>__<time>-<process>
    save_model: bool = False  # write the networks to agent.pt at the end
    capture_video: bool = False  # write a video of each policy's first episode in every evaluation
    track: bool = False  # mirror the log to Weights & Biases (pip install wandb)
    eval_every: int = 5_000  # environment steps between evaluations
    eval_episodes: int = 100  # episodes of each evaluation; 0: none, with no second environment
    log_every: int = 500  # steps between rows of training metrics
    checkpoint_every: int = 5_000  # a checkpoint is written at the first end of an episode after this many steps
    resume: str = ""  # folder of a stopped run, to continue it; its flags become the defaults
    # ---- the task
    max_episode_steps: int = 0  # time limit in actions; 0: the environment's own
    action_repeat: int = 1  # simulator steps per action
    reward_scale: float = 1.0  # offline and online rewards are multiplied by it
    reward_shift: float = 0.0  # added to the rewards after they are scaled
    # ---- the algorithm
    learning_starts: int = 5_000  # environment steps with uniform random actions before anything is trained online
    offline_steps: int = 0  # updates on offline rows alone, before the first environment step; published: 1e6
    utd_ratio: int = 20  # U, updates of all networks per environment step
    batch_size: int = 256  # B, rows of a slice, the batch of one critic update
    offline_ratio: float = 0.5  # share of offline rows in every slice; 0.5 is symmetric sampling
    gamma: float = 0.99  # discount per action
    guidance_lambda: float = 1.0  # small: follows value; large: imitates; published: .2 to 20, by task
    num_critics: int = 2  # E, heads of the critic and of the inner value
    critic_agg: Literal["mean", "min"] = "mean"  # joins heads in targets; published: min on puzzles, giant mazes
    tau: float = 0.005  # Polyak rate of the target critics, per critic update
    # ---- networks and optimisers
    hidden_dim: int = 512  # width of policy, critic and inner value; 256 on AntMaze
    hidden_layers: int = 4  # hidden layers of policy, critic and inner value
    time_frequencies: int = 32  # of the time, for the inner value: a sine and a cosine of each; 8 on AntMaze
    denoising_steps: int = 10  # K, Euler steps from noise to action
    learning_rate: float = 3e-4  # Adam, constant


class Batch(NamedTuple):
    """Transitions with any leading shape. `terminations` is 1 where the task ended, never at a time limit [ours 4]."""

    obs: Tensor  # (..., O)
    actions: Tensor  # (..., A)
    rewards: Tensor  # (...)
    next_obs: Tensor  # (..., O)
    terminations: Tensor  # (...)


class ReplayBuffer:
    """Offline rows, then online rows, on the training device. It has room for a whole run: nothing is overwritten."""

    def __init__(self, offline: tuple[np.ndarray, ...], capacity: int, device: torch.device):
        self.num_offline, self.size = len(offline[0]), 0
        shapes = [(len(array) + capacity, *array.shape[1:]) for array in offline]
        self.fields = Batch(*(torch.zeros(shape, device=device) for shape in shapes))
        self.add(*offline)

    def add(self, *rows: Any) -> None:
        """Appends the five fields of one transition, or of several, as arrays, tensors or numbers."""
        values = [torch.as_tensor(value, dtype=torch.float32) for value in rows]
        end = self.size + values[2].numel()  # one reward a row
        for field, value in zip(self.fields, values, strict=True):
            field[self.size : end] = value
        self.size = end

    def draw(self, offline_ratio: float, slices: int, rows: int) -> Batch:
        """A batch (U, B, ...), drawn uniformly; every slice has the same share of offline rows [paper Sec. 5]."""
        num, device = self.num_offline, self.fields.obs.device
        count = round(offline_ratio * rows) if self.size > num else rows  # offline rows of a slice; at first all are
        offline = torch.randint(num, (slices, count), device=device)
        online = torch.randint(num, max(self.size, num + 1), (slices, rows - count), device=device)
        index = torch.cat([offline, online], dim=1)  # (U, B)
        return Batch(*(field[index] for field in self.fields))


# ---- networks --------------------------------------------------------------------------------------------------------
def linear(in_dim: int, out_dim: int, init=nn.init.xavier_uniform_) -> nn.Linear:
    """A Linear layer with the weights drawn by `init` and zero bias [code]."""
    layer = nn.Linear(in_dim, out_dim)
    init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FlowPolicy(nn.Module):
    """A velocity v(s, x, t), an MLP with GELU. It moves noise (t = 0) to an action (t = 1), in Euler steps."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim, self.num_steps = action_dim, args.denoising_steps
        widths = [obs_dim + action_dim + 1] + [args.hidden_dim] * args.hidden_layers
        self.layers = nn.ModuleList(linear(i, o) for i, o in itertools.pairwise(widths))
        self.output = linear(widths[-1], action_dim)

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocities (..., A) of points x (..., A) at times t (..., 1). The time itself is an input [paper]."""
        x = torch.cat([obs, x, t], dim=-1)
        for layer in self.layers:
            x = F.gelu(layer(x))  # [ours q4]
        return self.output(x)

    @torch.no_grad()
    def flow(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The actions (..., A), in [-1, 1], that points x (..., A) at times t (..., 1) become."""
        for _ in range(self.num_steps):
            step = (1 - t).clamp(max=1 / self.num_steps)  # a point that has arrived stays
            x, t = x + step * self(obs, x, t), t + step
        return x.clamp(-1, 1)

    def sample(self, obs: Tensor) -> Tensor:
        """One action per observation: (..., O) -> (..., A) in [-1, 1]."""
        noise = torch.randn(*obs.shape[:-1], self.action_dim, device=obs.device)
        return self.flow(obs, noise, torch.zeros_like(noise[..., :1]))


class ValueEnsemble(nn.Module):
    """E value functions side by side as batched products: each an MLP of Linear, GELU, LayerNorm, a linear output."""

    def __init__(self, in_dim: int, args: Args):
        super().__init__()
        self.num, widths = args.num_critics, [in_dim] + [args.hidden_dim] * args.hidden_layers
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()  # (E, I, J) and (E, 1, J) of a layer
        for i, j in itertools.pairwise([*widths, 1]):
            bound = math.sqrt(6 / (i + j))  # Xavier-uniform, every member by itself
            self.weights.append(torch.empty(self.num, i, j).uniform_(-bound, bound))
            self.biases.append(torch.zeros(self.num, 1, j))
        self.scales = nn.ParameterList(torch.ones(self.num, 1, width) for width in widths[1:])  # of the LayerNorms
        self.shifts = nn.ParameterList(torch.zeros(self.num, 1, width) for width in widths[1:])

    def forward(self, *inputs: Tensor) -> Tensor:
        """values (E, ...) of inputs (..., I), which are joined: observations, actions."""
        x = torch.cat(inputs, dim=-1)
        shape, x = x.shape[:-1], x.flatten(0, -2).expand(self.num, -1, -1)  # (E, B, I)
        (*weights, last_weight), (*biases, last_bias) = self.weights, self.biases
        for weight, bias, scale, shift in zip(weights, biases, self.scales, self.shifts, strict=True):
            x = F.gelu(torch.baddbmm(bias, x, weight))
            x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)
        return torch.baddbmm(last_bias, x, last_weight).view(-1, *shape)


class InnerValue(ValueEnsemble):
    """V(s, x, t): the value of the action that the point x at time t of the flow becomes."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__(obs_dim + action_dim + 2 * args.time_frequencies, args)
        self.frequencies = nn.Buffer(torch.logspace(0, 8, args.time_frequencies, base=2))  # from 1 to 256 [paper]

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """values (E, ...) of points x (..., A) at times t (..., 1)."""
        angles = t * self.frequencies
        return super().forward(obs, x, angles.sin(), angles.cos())


# ---- policy ----------------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All networks, the policy that acts, and the three losses."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.policy = FlowPolicy(obs_dim, action_dim, args)
        self.critic = ValueEnsemble(obs_dim + action_dim, args)
        self.target_critic = copy.deepcopy(self.critic)
        self.inner_value = InnerValue(obs_dim, action_dim, args)

    def sample_actions(self, obs: Tensor) -> Tensor:
        """One sample of the policy (..., A): it acts, and it is evaluated."""
        return self.policy.sample(obs)

    def aggregate(self, values: Tensor) -> Tensor:
        """(E, ...) -> (...): the mean or the minimum of the heads."""
        return values.amin(0) if self.args.critic_agg == "min" else values.mean(0)

    @torch.no_grad()
    def td_target(self, batch: Batch) -> Tensor:
        """target_q (B,), with one sample of the policy as the next action."""
        next_actions = self.policy.sample(batch.next_obs)
        next_q = self.aggregate(self.target_critic(batch.next_obs, next_actions))
        return batch.rewards + self.args.gamma * (1 - batch.terminations) * next_q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, info): squared TD error, with the same target for every head."""
        target_q = self.td_target(batch)
        qs = self.critic(batch.obs, batch.actions)  # (E, B)
        loss = (qs - target_q).square().mean()
        return loss, {"losses/critic": loss, "critic/q_mean": qs.mean()}

    def inner_value_loss(self, obs: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, info): points x (B, A) at times t (B, 1) learn the Q of the actions that they become."""
        with torch.no_grad():
            q = self.aggregate(self.target_critic(obs, self.policy.flow(obs, x, t)))  # (B,)
        loss = (self.aggregate(self.inner_value(obs, x, t)) - q).square().mean()  # of the aggregate [paper]
        return loss, {"losses/inner_value": loss}

    def guidance(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What is added to the velocity at points x (B, A): the gradient of the mean inner value in x, over lambda."""
        x = x.detach().requires_grad_()
        value = self.inner_value(obs, x, t).mean(0).sum()  # every row has a gradient of its own
        return torch.autograd.grad(value, x)[0] / self.args.guidance_lambda

    def policy_loss(self, obs: Tensor, x: Tensor, t: Tensor, velocity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, info): squared error to the data's velocity (B, A) plus the guidance, summed over A [ours q3]."""
        guidance = self.guidance(obs, x, t)
        loss = (self.policy(obs, x, t) - (velocity + guidance)).square().sum(-1).mean()
        return loss, {"losses/policy": loss, "policy/guidance_norm": guidance.norm(dim=-1).mean()}

    forward = sample_actions  # agent(obs) acts as in the run's evaluations


# ---- updates ---------------------------------------------------------------------------------------------------------
class Optimizers:
    """One Adam with a constant learning rate for everything [paper]."""

    def __init__(self, agent: Agent, args: Args):
        networks = agent.policy, agent.critic, agent.inner_value
        parameters = itertools.chain(*(network.parameters() for network in networks))
        self.adam = torch.optim.Adam(parameters, args.learning_rate, fused=True)


def gradient_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step on the optimizer's own parameters. Other networks in the loss get no gradient."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def move_towards(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- target + rate (online - target), for all parameters."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)  # pyright: ignore


def points_between(actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x, t, velocity): points (B, A) on straight lines from noise to actions, at uniform times (B, 1) [ours q2]."""
    t = torch.rand(len(actions), 1, device=actions.device)
    noise = torch.randn_like(actions)
    return (1 - t) * noise + t * actions, t, actions - noise


def update(agent: Agent, optimizers: Optimizers, batch: Batch) -> dict[str, Tensor]:
    """U steps of all networks, one on every slice of a batch (U, B, ...) [ours q1]."""
    info: dict[str, Tensor] = {}
    for fields in zip(*batch, strict=True):
        rows = Batch(*fields)
        x, t, velocity = points_between(rows.actions)
        critic_loss, info = agent.critic_loss(rows)
        inner_value_loss, inner_value_info = agent.inner_value_loss(rows.obs, x, t)
        policy_loss, policy_info = agent.policy_loss(rows.obs, x, t, velocity)
        # No network is in two of these losses with a gradient. So their sum needs no weights.
        gradient_step(optimizers.adam, critic_loss + inner_value_loss + policy_loss)
        move_towards(agent.target_critic, agent.critic, agent.args.tau)
        info |= inner_value_info | policy_info
    return {key: value.detach() for key, value in info.items()}


# ---- evaluation, log, save and resume --------------------------------------------------------------------------------
def episode_seed(*words: int) -> int:
    """The seed of a reset, from --seed, 0 for training or 1 for evaluation, and the number of the episode."""
    return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1  # simulators take seeds below 2**31


def evaluate(policies: dict[str, Any], envs: list[gym.Env], args: Args, device: torch.device) -> dict[str, float]:
    """Mean return, length and success of every policy, over the same episodes. Torch's random state is left alone."""
    metrics: dict[str, float] = {}
    for kind, act in policies.items():
        (returns, lengths, solved), mentioned = np.zeros((3, args.eval_episodes)), False
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            for first in tqdm(range(0, args.eval_episodes, len(envs)), desc="evaluating", leave=False, disable=None):
                running = dict(zip(range(first, args.eval_episodes), envs, strict=False))  # episode -> environment
                obs = [env.reset(seed=episode_seed(args.seed, 1, i))[0] for i, env in running.items()]
                while running:  # ended episodes keep their row: torch.compile wants batches of one shape
                    actions = act(torch.as_tensor(np.stack(obs), dtype=torch.float32, device=device)).cpu().numpy()
                    for i, env in list(running.items()):
                        obs[i - first], reward, terminated, truncated, info = env.step(actions[i - first])
                        returns[i], lengths[i] = returns[i] + float(reward), lengths[i] + 1
                        mentioned |= "success" in info
                        solved[i] += bool(info.get("success"))  # counts its solved steps
                        if terminated or truncated:
                            del running[i]
        metrics |= {f"{kind}return": returns.mean(), f"{kind}length": lengths.mean()}
        if mentioned:  # some episode reported success, so one without a report has failed
            metrics |= {f"{kind}success_rate": (solved > 0).mean(), f"{kind}solved_share": (solved / lengths).mean()}
    return metrics


class Log:
    """A run's folder: args.json, metrics.csv with one value a row, TensorBoard. `state` comes from a checkpoint."""

    def __init__(self, folder: Path, args: Args, data_crc32: int, state: dict[str, Any], step: int):
        folder.mkdir(parents=True, exist_ok=bool(args.resume or args.run_dir))
        path = folder / "args.json"
        old = json.loads(path.read_text()) if args.resume else {"data_crc32": data_crc32, "starts": []}
        self.file = open(folder / "metrics.csv", "ab", buffering=0)
        size, expected, header = self.file.tell(), state["bytes"], b"step,seconds,key,value\n"
        if old["data_crc32"] != data_crc32 or size < expected or size > len(header) > expected:
            raise OSError(f"{folder}: the data, metrics.csv or checkpoint.pt is missing, or not the one of this run")
        git = f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty --exclude="*"'
        commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip()
        versions = {m: sys.modules[m].__version__ for m in "torch numpy gymnasium mujoco".split() if m in sys.modules}
        start = {"command": sys.argv, "commit": commit, "versions": versions | {"python": platform.python_version()}}
        record = {"script": Path(__file__).stem, "data_crc32": data_crc32, "pid": os.getpid(), "host": platform.node()}
        record |= {"args": vars(args), "starts": [*old["starts"], start]}
        write_whole(path, json.dumps(record, indent=2).encode())
        self.sums, self.started = state["sums"], time.monotonic() - state["seconds"]
        self.file.truncate(self.file.seek(expected))  # drops what a killed run wrote after its checkpoint
        self.file.write(header[expected:])
        if args.track:
            wandb = importlib.import_module("wandb")
            wandb.init(project="expo", name=folder.name, config=vars(args), sync_tensorboard=True)
        self.tensorboard = SummaryWriter(str(folder), purge_step=step)

    def state(self) -> dict[str, Any]:
        """What a new Log needs to continue from here. Everything before is on the disk."""
        self.tensorboard.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "seconds": time.monotonic() - self.started, "sums": dict(self.sums)}

    def add(self, values: dict[str, Any]) -> None:
        """Remembers values (log key -> number or 0-d tensor) for the next `write`. Nothing leaves the device yet."""
        for key, value in values.items():
            total, count = self.sums.get(key, (0.0, 0))
            self.sums[key] = total + torch.as_tensor(value, dtype=torch.float64), count + 1

    def write(self, step: int) -> None:
        """Writes the mean of everything added since the last `write`. A mean that is not finite ends the run."""
        means = {key: float(total) / count for key, (total, count) in self.sums.items()}
        self.sums, seconds = {}, time.monotonic() - self.started
        for key, mean in means.items():
            self.file.write(f"{step},{seconds:.3f},{key},{mean:.8g}\n".encode())
            self.tensorboard.add_scalar(key, mean, step)
            if not math.isfinite(mean):
                raise FloatingPointError(f"step {step}: {key} is {mean}; lower the learning rates or check the rewards")
        self.tensorboard.add_scalar("charts/SPS", max(step, 0) / seconds, step)
        if "eval/return" in means:
            words = [f"{k[5:]} {v:.2f}" for k, v in means.items() if k.endswith(("success_rate", "eval/return"))]
            tqdm.write(f"step {step:,}, {seconds:.0f} s, evaluation: {'  '.join(words)}")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: the run may be killed at any moment, and the disk may be full."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save(folder: Path, agent: Agent, optimizers: Optimizers, buffer: ReplayBuffer, log: Log, step: int, episode: int):
    """Writes checkpoint.pt, without offline rows and simulator. So a run saves between episodes, and at its end."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise FloatingPointError(f"step {step}: the networks are not finite any more; lower the learning rates")
    state = {"step": step, "episode": episode, "log": log.state(), "random": torch.get_rng_state()}
    state |= {"agent": agent.state_dict(), "optimizers": {k: v.state_dict() for k, v in vars(optimizers).items()}}
    state["rows"] = [field[buffer.num_offline : buffer.size].clone() for field in buffer.fields]
    state["cuda"] = [torch.cuda.get_rng_state()] if buffer.fields.obs.is_cuda else []
    torch.save(state, content := io.BytesIO())
    write_whole(folder / "checkpoint.pt", content.getvalue())


def load(path: Path, agent: Agent, optimizers: Optimizers, buffer: ReplayBuffer) -> dict[str, Any]:
    """Puts back what `save` wrote. The file can hold tensors and plain values only: nothing in it is run."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch does not look at the checksums
            raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location=buffer.fields.obs.device, weights_only=True)
        agent.load_state_dict(state["agent"])
        for name, part in vars(optimizers).items():
            part.load_state_dict(state["optimizers"][name])
        buffer.add(*state["rows"])
        torch.set_rng_state(state["random"].cpu())
        torch.cuda.set_rng_state_all([random.cpu() for random in state["cuda"]])
    except Exception as error:  # torch raises many kinds
        raise OSError(f"{path} is damaged, or beyond --total-timesteps: {' '.join(str(error).split())}") from None
    return state


def main(args: Args) -> None:
    """One run: load the data, learn offline if asked to, then act and learn online."""
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    name = f"{args.task or args.env_id}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume or args.run_dir or f"runs/{name.replace('/', '_').replace(':', '_')}-{os.getpid()}")
    env_flags = args.env_id, args.task, args.max_episode_steps, args.action_repeat, args.obs_keys
    env, modes = make_env(*env_flags), ["rgb_array" if args.capture_video else None, *[None] * 19]
    eval_envs = [make_env(*env_flags, render_mode=mode) for mode in modes[: args.eval_episodes]]  # 20 at most
    data = load_dataset(args.dataset, env, args.obs_keys)  # NumPy arrays: obs, actions, rewards, next_obs, terminations
    obs_dim, action_dim = data[0].shape[1], data[1].shape[1]

    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim, args).to(device)
    optimizers = Optimizers(agent, args)
    buffer = ReplayBuffer(data, args.total_timesteps, device)
    buffer.fields.rewards.mul_(args.reward_scale).add_(args.reward_shift)
    if args.compile:
        for name in ("sample_actions", "critic_loss", "inner_value_loss", "policy_loss"):
            setattr(agent, name, torch.compile(getattr(agent, name), options={"fallback_random": True}))
    policies = {"eval/": agent.sample_actions}
    # Offline updates have steps below 0, so that step 1 is the first environment step in every plot.
    state: dict[str, Any] = {"step": -args.offline_steps - 1, "episode": 0, "log": dict(bytes=0, seconds=0, sums={})}
    if (folder / "checkpoint.pt").exists():
        state = load(folder / "checkpoint.pt", agent, optimizers, buffer)
    first, episode = state["step"] + 1, state["episode"]
    log = Log(folder, args, zlib.crc32(b"".join(field.tobytes() for field in data)), state["log"], first)
    if args.capture_video:
        rounds = math.ceil(args.eval_episodes / len(eval_envs))  # episodes of one environment and policy
        eval_envs[0] = gym.wrappers.RecordVideo(eval_envs[0], str(folder / "videos"), lambda i: i % rounds == 0)
    save(folder, agent, optimizers, buffer, log, first - 1, episode)
    print(f"on {device}, in {folder}; to watch: tensorboard --logdir {folder.parent}")
    # The first Ctrl-C or SIGTERM ends the run with its episode, and saves it. The second one ends it at once.
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number) if stop else stop.append(number))

    def finish(step: int, between_episodes: bool) -> None:
        """The end of a step: evaluates, logs, saves and stops, where it is due."""
        evaluating = step >= 0 and (step % args.eval_every == 0 or step == args.total_timesteps)
        if evaluating and eval_envs:
            eval_envs[0].name_prefix = f"step{step}"  # of its video  # pyright: ignore[reportAttributeAccessIssue]
            log.add(evaluate(policies, eval_envs, args, device))
        if evaluating or step % args.log_every == 0:
            log.write(step)
        due = between_episodes and (stop or step - state["step"] >= args.checkpoint_every)
        if due or step == args.total_timesteps:
            save(folder, agent, optimizers, buffer, log, step, episode + (not between_episodes))
            state["step"] = step
        if due and stop:
            print(f"stopped after step {step}; to continue: --resume {folder}", file=sys.stderr)
            [one.close() for one in (env, *eval_envs)]  # completes the last video, and frees a robot
            sys.exit(128 + stop[0])

    # The same update on offline rows alone, before the first environment step.
    for step in tqdm(range(first, 1), desc="offline", unit="update", disable=None):  # 0: an evaluation, no update
        if step < 0:
            log.add(update(agent, optimizers, buffer.draw(1.0, 1, args.batch_size)))
        finish(step, True)

    obs, episodic_return = env.reset(seed=episode_seed(args.seed, 0, episode))[0], 0.0
    for step in tqdm(range(max(first, 1), args.total_timesteps + 1), desc="online", unit="step", disable=None):
        if step <= args.learning_starts:
            action = 2 * torch.rand(action_dim) - 1
        else:
            action = agent.sample_actions(torch.tensor(obs, dtype=torch.float32, device=device)[None])[0].cpu()
        next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
        buffer.add(obs, action, args.reward_scale * float(reward) + args.reward_shift, next_obs, terminated)
        obs, episodic_return = next_obs, episodic_return + float(reward)
        if step > args.learning_starts:
            log.add(update(agent, optimizers, buffer.draw(args.offline_ratio, args.utd_ratio, args.batch_size)))
        if terminated or truncated:  # only the former is stored as an end [ours 4]
            log.add({"charts/episodic_return": episodic_return})
            episode += 1
            obs, episodic_return = env.reset(seed=episode_seed(args.seed, 0, episode))[0], 0.0
        finish(step, terminated or truncated)
    if args.save_model:
        torch.save({"agent": agent.state_dict(), "obs_dim": obs_dim, "action_dim": action_dim}, content := io.BytesIO())
        write_whole(folder / "agent.pt", content.getvalue())
    print(f"done: {folder}; to go on: --resume {folder} --total-timesteps {2 * args.total_timesteps or 10_000}")
    [one.close() for one in (env, *eval_envs)]


if __name__ == "__main__":
    try:
        main(parse_args(Args, __doc__))
    except (OSError, FloatingPointError, RuntimeError) as error:  # bad input, a full disk, a loss that is not finite
        hint = "; use --no-compile" if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) else ""
        if isinstance(error, RuntimeError) and not hint:
            raise
        print(f"error: {str(error).splitlines()[0]}{hint}", file=sys.stderr)
        sys.exit(2)
