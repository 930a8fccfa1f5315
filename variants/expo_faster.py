"""FASTER, a cheaper EXPO from EXPO's authors: choose one of N noises, and denoise only that one. In one file.

Paper: FASTER, arXiv 2604.19730; [faster] is its code. The other tags are of EXPO, arXiv 2507.07986, where this starts.
Docs: docs/expo_faster.md explains [ours f1] to [ours f4], and docs/expo_diffusion.md every other [ours n].

    python variants/expo_faster.py                                   # the same maze as expo_flow.py
    python variants/expo_faster.py --task pointmaze-large --seed 1   # another task; add --help to see its settings
    python variants/expo_faster.py --env-id Pusher-v5 --dataset my_data.hdf5

EXPO has two policies. The *base policy* is expressive and only imitates the replay data: no value gradient flows
through its denoising chain. The *edit policy* is a small Gaussian. It moves a base action by at most `edit_scale`
towards higher Q. The policy that acts is built on the fly: it samples base actions, edits them, and takes the candidate
with the highest Q. The TD target follows the same policy.

How it differs from expo_flow.py: most of EXPO's time goes into N denoising chains. But the chain of a flow [ours f1]
draws nothing: the first noise z decides which action comes out. So a new network, the *filter* F(s, z), learns the
value of that action. It chooses one of N noises. One chain runs, and the critics choose between its action and an edit
of it. The TD target has a second change: one random critic ranks the two, and another one values the better one. EXPO
takes the minimum over two critics for both.

Shapes: B batch, O observation, A action, N noises, C = 2 candidates, E critics and heads of the filter, K denoising
steps, U critic updates per environment step (UTD).  Tags: [faster], [paper Sec. n], [code] = EXPO's code, [ours n].
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
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard.writer import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds utils/ from `python variants/expo_faster.py`

from utils.data import load_dataset
from utils.envs import make_env
from utils.tasks import parse_args


@dataclass
class Args:
    # These values are published, but for edit_entropy. A --task, also the default one, lays its settings
    # over them (utils/tasks.py). `--task ""`, or --env-id without --task, runs with these values. A flag you give wins.
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
    precision: Literal["float32", "bfloat16"] = "float32"  # of the TD target's candidates; all else stays float32
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
    offline_steps: int = 0  # [ours 3] updates on offline rows alone, before the first environment step
    utd_ratio: int = 20  # U, critic updates per environment step; the policies are updated once, on the last slice
    batch_size: int = 256  # B, rows of a slice, the batch of one critic update
    offline_ratio: float = 0.5  # share of offline rows in every slice; 0.5 is symmetric sampling
    gamma: float = 0.99  # discount per action
    num_noises: int = 8  # N, first noises per decision; the filter chooses one
    filter_temperature: float = 1.0  # of that choice in training; 0: the best noise, as in evaluation
    edits: bool = True  # --no-edits: the action that comes out is the only candidate [ours 5]
    edit_scale: float = 0.05  # bound of an edit, the flag that matters most: .01-.15 to refine, .4-.7 to explore
    edit_dropout: float = 0.0  # dropout of the edit policy in its own loss; 0.1 on Adroit
    edit_entropy: Literal["scaled", "published"] = "scaled"  # entropy target; scaled fits every --edit-scale [ours 1]
    init_alpha: float = 1.0  # entropy temperature of the edit policy at the start
    num_critics: int = 10  # E, critics of the ensemble
    num_min_critics: int = 2  # random heads whose minimum counts, when the filter chooses and when acting; 1 on AntMaze
    tau: float = 0.005  # Polyak rate of the target critics, per critic update
    ema_rate: float = 0.001  # rate of the base policy's moving average, per base update
    # ---- networks and optimisers
    hidden_dim: int = 256  # width of critics and edit policy
    hidden_layers: int = 3  # hidden layers of critics and edit policy
    critic_lr: float = 3e-4  # Adam, constant
    edit_lr: float = 3e-4  # Adam, cosine decay to 0
    alpha_lr: float = 3e-4  # Adam, constant
    base_lr: float = 3e-4  # AdamW, cosine decay to 0
    base_weight_decay: float = 1e-4  # AdamW's weight decay
    lr_decay_steps: int = 3_000_000  # updates until the decayed learning rates reach 0
    base_hidden_dim: int = 256  # width of the base policy
    base_blocks: int = 3  # residual blocks of the base policy
    base_expansion: int = 4  # inner width of a residual block, as a multiple of base_hidden_dim
    denoising_steps: int = 10  # K, steps from noise to action


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


def lecun_normal_(weight: Tensor) -> Tensor:
    """Flax's default init: variance 1 / fan-in, normal cut at two standard deviations (hence the .8796) [code]."""
    std = math.sqrt(1 / weight.shape[1]) / 0.87962566
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class ResidualBlock(nn.Module):
    """LayerNorm, widen, swish, narrow, add: (..., width) -> (..., width)."""

    def __init__(self, width: int, expansion: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen = linear(width, width * expansion, lecun_normal_)
        self.narrow = linear(width * expansion, width, lecun_normal_)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.silu(self.widen(self.norm(x))))


class DenoisingNetwork(nn.Module):
    """The base policy's network, from IDQL [code]: (noisy actions, obs, code of the time) -> (..., A)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        width = args.base_hidden_dim
        self.frequencies = nn.Parameter(0.2 * torch.randn(64))  # learned Fourier features of the time
        self.time_mlp = nn.Sequential(linear(128, width), nn.SiLU(), linear(width, width))
        self.input = linear(action_dim + obs_dim + width, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, args.base_expansion) for _ in range(args.base_blocks)))
        self.output = linear(width, action_dim)

    def time_code(self, time: Tensor) -> Tensor:
        """Code (..., W) of the times (..., 1); computed once for a whole batch that shares its time."""
        angles = 2 * math.pi * time * self.frequencies
        return self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def forward(self, noisy_actions: Tensor, obs: Tensor, time_code: Tensor) -> Tensor:
        x = torch.cat([noisy_actions, obs], dim=-1)
        # One Linear on [noisy action, obs, time code], as two products: while sampling, all rows share one time code.
        x_weight, time_weight = self.input.weight.split([x.shape[-1], time_code.shape[-1]], dim=1)
        x = F.linear(x, x_weight) + F.linear(time_code, time_weight, self.input.bias)
        return self.output(F.silu(self.blocks(x)))


class BasePolicy(nn.Module):
    """Flow matching: it learns the velocity from noise to action, and follows it in K Euler steps. Imitation only."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim = action_dim
        self.times = nn.Buffer(torch.arange(args.denoising_steps).unsqueeze(-1) / args.denoising_steps)  # (K, 1)
        self.network = DenoisingNetwork(obs_dim, action_dim, args)

    def loss(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Squared error of the predicted velocity, summed over action dimensions, mean over the batch: a scalar."""
        # Time runs from noise (0) to action (1) and is uniform; pi0 runs it the other way, with t ~ Beta(1.5, 1).
        t = torch.rand(len(actions), 1, device=actions.device)
        noise = torch.randn_like(actions)
        noisy_actions = (1 - t) * noise + t * actions
        prediction = self.network(noisy_actions, obs, self.network.time_code(t))
        return (prediction - (actions - noise)).square().sum(-1).mean()

    @torch.no_grad()
    def sample(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """One action per observation: (..., O) -> (..., A) in [-1, 1]."""
        x = torch.randn(*obs.shape[:-1], self.action_dim, device=obs.device) if noise is None else noise
        for time_code in self.network.time_code(self.times):  # (K, W)
            x = x + self.network(x, obs, time_code) / len(self.times)
        return x.clamp(-1, 1)


class EditPolicy(nn.Module):
    """Tanh-Gaussian edits of a base action, every dimension within +-edit_scale [paper Sec. 4.1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        widths = [obs_dim + action_dim] + [args.hidden_dim] * args.hidden_layers
        self.layers = nn.ModuleList(linear(i, o) for i, o in itertools.pairwise(widths))
        self.mean = linear(widths[-1], action_dim)
        self.log_std = linear(widths[-1], action_dim)
        self.scale, self.dropout = args.edit_scale, args.edit_dropout

    def forward(self, obs: Tensor, base_actions: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
        """Edits (..., A) and their log-density (...), for observations (..., O) and base actions (..., A)."""
        x = torch.cat([obs, base_actions], dim=-1)
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x)), self.dropout, training=train)
        mean, log_std = self.mean(x), self.log_std(x).clamp(-20, 2)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of u, per dimension
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # of tanh(u): minus log(1 - tanh(u)^2)
        log_prob = log_prob - math.log(self.scale)  # of scale * tanh(u)
        return self.scale * u.tanh(), log_prob.sum(-1)


class Critic(nn.Module):
    """E Q-functions side by side as batched products: each an MLP of Linear, LayerNorm, ReLU, and a linear output."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.num, widths = args.num_critics, [obs_dim + action_dim] + [args.hidden_dim] * args.hidden_layers
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()  # (E, I, J) and (E, 1, J) of a layer
        for i, j in itertools.pairwise([*widths, 1]):
            bound = math.sqrt(6 / (i + j))  # Xavier-uniform, every member by itself [code]
            self.weights.append(torch.empty(self.num, i, j).uniform_(-bound, bound))
            self.biases.append(torch.zeros(self.num, 1, j))
        self.scales = nn.ParameterList(torch.ones(self.num, 1, width) for width in widths[1:])  # of the LayerNorms
        self.shifts = nn.ParameterList(torch.zeros(self.num, 1, width) for width in widths[1:])

    def forward(self, obs: Tensor, actions: Tensor, heads: Tensor | None = None) -> Tensor:
        """qs (E, ...) of observations (..., O) and actions (..., A). With `heads`, only those are computed."""
        groups = [list(group) for group in (self.weights, self.biases, self.scales, self.shifts)]
        if heads is not None:  # parameter[heads] gives the same and is far slower
            groups = [[parameter.index_select(0, heads) for parameter in group] for group in groups]
        (*weights, last_weight), (*biases, last_bias), scales, shifts = groups
        x = torch.cat([obs, actions], dim=-1).flatten(0, -2)
        x = x.expand(len(last_weight), *x.shape)  # (E, B, O + A)
        for weight, bias, scale, shift in zip(weights, biases, scales, shifts, strict=True):
            x = torch.baddbmm(bias, x, weight)
            x = F.relu(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale))
        return torch.baddbmm(last_bias, x, last_weight).view(-1, *obs.shape[:-1])

    def random_min(self, obs: Tensor, actions: Tensor, num: int) -> Tensor:
        """q (...): the minimum over `num` heads that are drawn anew at every call."""
        heads = torch.randperm(self.num, device=obs.device)[:num] if num < self.num else None
        return self(obs, actions, heads).amin(0)


# ---- on-the-fly policy -----------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All networks, the policy that is built from them on the fly, and the losses of critics and edit policy."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.base_policy = BasePolicy(obs_dim, action_dim, args)
        self.target_base_policy = copy.deepcopy(self.base_policy)  # moving average: acts; the TD target does not use it
        self.edit_policy = EditPolicy(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic)  # ranks candidates and makes the TD target
        self.filter = Critic(obs_dim, action_dim, args)  # F(s, z): a noise takes the place of the action [ours f2]
        self.target_filter = copy.deepcopy(self.filter)  # chooses noises
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        # An edit's entropy is at most A log(2 edit_scale). Below edit_scale .303 the published target is out of reach:
        # alpha then grows without bound, and the edits decay to noise. The scaled target [ours 1] moves with the bound.
        scaled = math.log(args.edit_scale) if args.edit_entropy == "scaled" else 0.0
        self.target_entropy = action_dim * (scaled - 0.5)

    @torch.no_grad()
    def choose_noise(self, obs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """One of N noises (..., 1, A) at observations (..., O), and the standard deviation (..., 1) of the scores."""
        noises = torch.randn(*obs.shape[:-1], self.args.num_noises, self.base_policy.action_dim, device=obs.device)
        obs = obs.unsqueeze(-2).expand(*noises.shape[:-1], -1)
        scores = self.target_filter.random_min(obs, noises, self.args.num_min_critics)  # (..., N)
        spread = scores.std(-1, correction=0, keepdim=True)
        scores = (scores - scores.mean(-1, keepdim=True)) / spread.clamp(min=1e-6)
        # The largest sum of score and temperature * Gumbel noise is a draw from softmax(scores / temperature) [faster].
        gumbel = -torch.empty_like(scores).exponential_().log()
        choice = (scores + temperature * gumbel).argmax(-1)
        return torch.take_along_dim(noises, choice[..., None, None], dim=-2), spread

    @torch.no_grad()
    def base_actions(self, obs: Tensor, base_policy: BasePolicy, noise: Tensor) -> Tensor:
        """What a base policy makes of noises (..., 1, A) at observations (..., O): actions of the same shape."""
        return base_policy.sample(obs.unsqueeze(-2), noise)

    @torch.no_grad()
    def with_edits(self, obs: Tensor, base_actions: Tensor) -> Tensor:
        """Candidates (..., C, A) at observations (..., O): the base action (..., 1, A), and an edit of it."""
        if not self.args.edits:
            return base_actions
        edits, _ = self.edit_policy(obs.unsqueeze(-2), base_actions)
        edited_actions = (base_actions + edits).clamp(-1, 1)
        return torch.cat([base_actions, edited_actions], dim=-2)

    @torch.no_grad()
    def rank(self, obs: Tensor, candidates: Tensor) -> Tensor:
        """q (..., C) of the candidates: the minimum over one random subset of target critics [code]."""
        obs = obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1)
        return self.target_critic.random_min(obs, candidates, self.args.num_min_critics)

    def on_the_fly_actions(self, obs: Tensor, temperature: float = 0.0) -> Tensor:
        """The best candidate (..., A), by the moving average of the base policy [code]; temperature 0 is evaluation."""
        noise, _ = self.choose_noise(obs, temperature)
        candidates = self.with_edits(obs, self.base_actions(obs, self.target_base_policy, noise))
        choice = self.rank(obs, candidates).argmax(-1)
        return torch.take_along_dim(candidates, choice[..., None, None], dim=-2).squeeze(-2)

    @torch.no_grad()
    def td_target(self, batch: Batch, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """target_q (B,), the filter's target (B,), and which of the candidates (B, C, A) at next_obs is taken (B,)."""
        args = self.args
        heads = torch.rand(args.num_critics, device=candidates.device).argsort()[:2]
        next_obs = batch.next_obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1)
        qs = self.target_critic(next_obs, candidates, heads)  # (2, B, C)
        choice = qs[0].argmax(-1)
        next_q = qs[-1].gather(-1, choice.unsqueeze(-1)).squeeze(-1)  # of the other head [faster]
        filter_target = qs[..., 0].amin(0)  # of the action without its edit [faster]
        return batch.rewards + args.gamma * (1 - batch.terminations) * next_q, filter_target, choice

    def critic_loss(self, batch: Batch, candidates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, filter_target, info): squared TD error, with the same target for every head [paper Sec. 4.2]."""
        target_q, filter_target, choice = self.td_target(batch, candidates)
        qs = self.critic(batch.obs, batch.actions)  # (E, B)
        loss = (qs - target_q).square().mean()
        selected = (choice > 0).float().mean()
        return loss, filter_target, {"losses/critic": loss, "critic/q_mean": qs.mean(), "edit/selected_share": selected}

    def filter_loss(self, obs: Tensor, noise: Tensor, filter_target: Tensor) -> Tensor:
        """Squared error of the filter on the chosen noises (B, 1, A), with the same target (B,) for every head."""
        return (self.filter(obs, noise.squeeze(-2)) - filter_target).square().mean()

    def edit_policy_loss(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(loss, entropy, info): SAC's objective, on edits of the batch's own actions, not of base samples [code]."""
        edits, log_prob = self.edit_policy(batch.obs, batch.actions, train=True)
        q = self.critic(batch.obs, (batch.actions + edits).clamp(-1, 1)).mean(0)  # all online heads [code]
        alpha, entropy = self.log_alpha.exp(), -log_prob.mean()
        loss = (alpha.detach() * log_prob - q).mean()
        info = {"losses/edit_policy": loss, "edit/alpha": alpha, "edit/entropy": entropy}
        return loss, entropy, info | {"edit/abs_mean": edits.abs().mean()}

    forward = on_the_fly_actions  # agent(obs) acts


# ---- updates ---------------------------------------------------------------------------------------------------------
class Optimizers:
    """Adam for everything, with weight decay for the base policy, and cosine decay for base and edit policy [code]."""

    def __init__(self, agent: Agent, args: Args):
        def cosine(n: int) -> float:
            return 0.5 + 0.5 * math.cos(math.pi * min(n / args.lr_decay_steps, 1))

        base, decay = agent.base_policy.parameters(), args.base_weight_decay
        self.base = torch.optim.AdamW(base, args.base_lr, weight_decay=decay, fused=True)
        self.edit = torch.optim.Adam(agent.edit_policy.parameters(), args.edit_lr, fused=True)
        self.critic = torch.optim.Adam(agent.critic.parameters(), args.critic_lr, fused=True)
        self.filter = torch.optim.Adam(agent.filter.parameters(), args.critic_lr, fused=True)
        self.alpha = torch.optim.Adam([agent.log_alpha], args.alpha_lr, fused=True)
        self.base_decay, self.edit_decay = LambdaLR(self.base, cosine), LambdaLR(self.edit, cosine)


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


def update_base_policy(agent: Agent, optimizers: Optimizers, obs: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """One imitation step on (B, O), (B, A), good and bad rows alike, and one step of the moving average."""
    loss = agent.base_policy.loss(obs, actions)
    gradient_step(optimizers.base, loss)
    optimizers.base_decay.step()
    move_towards(agent.target_base_policy, agent.base_policy, agent.args.ema_rate)
    return {"losses/base_policy": loss.detach()}


def next_candidates(agent: Agent, next_obs: Tensor, noises: Tensor) -> Tensor:
    """Candidates (U, B, C, A) of the TD targets at next_obs (U, B, O), from the online base policy [code]."""
    device = next_obs.device.type
    # As many rows at a time as fit into a CPU's cache, or onto a GPU.
    size = 2048 if device == "cpu" else 16_384
    parts = zip(next_obs.flatten(0, 1).split(size), noises.flatten(0, 1).split(size), strict=True)
    with torch.autocast(device, torch.bfloat16, enabled=agent.args.precision == "bfloat16"):
        candidates = [agent.with_edits(obs, agent.base_actions(obs, agent.base_policy, noise)) for obs, noise in parts]
    return torch.cat(candidates).unflatten(0, next_obs.shape[:2])


def update(agent: Agent, optimizers: Optimizers, batch: Batch) -> dict[str, Tensor]:
    """U critic steps on the slices of a batch (U, B, ...), then one step of each policy on the last slice [code]."""
    # For all slices, as in EXPO: the policies stand still while critics learn. But the filter learns, too [ours f3].
    chosen = [agent.choose_noise(obs, agent.args.filter_temperature) for obs in batch.next_obs]
    noises, spreads = map(torch.stack, zip(*chosen, strict=True))
    candidates = next_candidates(agent, batch.next_obs, noises)
    slices = [Batch(*fields) for fields in zip(*batch, strict=True)]
    info: dict[str, Tensor] = {}
    for u, rows in enumerate(slices):
        loss, filter_target, info = agent.critic_loss(rows, candidates[u])
        gradient_step(optimizers.critic, loss)
        move_towards(agent.target_critic, agent.critic, agent.args.tau)
        info["losses/filter"] = loss = agent.filter_loss(rows.next_obs, noises[u], filter_target)
        gradient_step(optimizers.filter, loss)
        move_towards(agent.target_filter, agent.filter, agent.args.tau)
    info |= {"filter/spread": spreads.mean()}
    info |= update_base_policy(agent, optimizers, slices[-1].obs, slices[-1].actions)
    if agent.args.edits:
        loss, entropy, edit_info = agent.edit_policy_loss(slices[-1])
        gradient_step(optimizers.edit, loss)
        # SAC's temperature: alpha grows while the entropy is below its target.
        gradient_step(optimizers.alpha, agent.log_alpha.exp() * (entropy.detach() - agent.target_entropy))
        optimizers.edit_decay.step()
        info |= edit_info
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
        for name in ("on_the_fly_actions", "base_actions", "critic_loss", "filter_loss", "edit_policy_loss"):
            setattr(agent, name, torch.compile(getattr(agent, name), options={"fallback_random": True}))
    policies = {"eval/": agent.on_the_fly_actions, "eval/base_": agent.target_base_policy.sample}
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

    # The same update on offline rows alone, before the first environment step [ours 3].
    for step in tqdm(range(first, 1), desc="offline", unit="update", disable=None):  # 0: an evaluation, no update
        if step < 0:
            log.add(update(agent, optimizers, buffer.draw(1.0, 1, args.batch_size)))
        finish(step, True)

    obs, episodic_return = env.reset(seed=episode_seed(args.seed, 0, episode))[0], 0.0
    for step in tqdm(range(max(first, 1), args.total_timesteps + 1), desc="online", unit="step", disable=None):
        if step <= args.learning_starts:
            action = 2 * torch.rand(action_dim) - 1
        else:
            row = torch.tensor(obs, dtype=torch.float32, device=device)[None]
            action = agent.on_the_fly_actions(row, args.filter_temperature).squeeze(0).cpu()
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
