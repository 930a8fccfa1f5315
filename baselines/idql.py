"""IDQL, a baseline: implicit Q-learning's critics, a diffusion policy that imitates, and the best of its samples.

Paper: IDQL: Implicit Q-Learning as an Actor-Critic Method with Diffusion Policies (Hansen-Estruch et al. 2023),
arXiv 2304.10573. Its code, github.com/philippe-eecs/IDQL, is [idql code] below; a bare [code] stands in definitions
shared with EXPO and means EXPO's.

    python baselines/idql.py                                   # the quickstart maze, as expo_diffusion.py learns it
    python baselines/idql.py --task pointmaze-large --seed 1   # another task; --help shows a task's defaults
    python baselines/idql.py --env-id Pusher-v5 --dataset my_data.hdf5

How it differs from expo_diffusion.py: no edit policy, and no policy in the TD target. The critics learn from stored
actions only: V is an upper expectile of Q over the data's actions, Q regresses to r + gamma V(s'). The base policy,
which imitates, is EXPO's; its best sample by Q acts. Critics, buffers, symmetric batches, UTD and the loop are EXPO's
too. Published are twin critics without LayerNorm (`--num-critics 2` is the first half of that).

Shapes: B batch, O observation, A action, N action samples, E critics, K denoising steps, U critic updates per
environment step (UTD).
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/idql.py` finds utils/ this way

from utils import cli, data
from utils.buffer import Batch, ReplayBuffer
from utils.checkpoint import Run
from utils.compiling import compilable
from utils.evaluate import Evaluation
from utils.logger import Logger
from utils.tasks import make_task_env


@dataclass
class Args:
    # ---- the run
    task: str = "pointmaze-medium"  # environment, data and settings in one word; `python -m utils.data list`
    env_id: str = ""  # any Gymnasium id with continuous actions, with --dataset; without --task: published settings
    dataset: tuple[str, ...] = ()  # offline data, joined if several: FILE, d4rl:NAME, minari:ID, ... (docs/data.md)
    obs_keys: tuple[str, ...] = ()  # observation keys to use, in this order, where the data has several (robomimic)
    seed: int = 1  # seeds networks, exploration, batches, resets and evaluation
    total_timesteps: int = 300_000  # environment steps
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda
    threads: int = 0  # CPU threads of torch; 0 leaves torch's own choice
    compile: bool = False  # torch.compile: the same numbers, sooner; a minute or two on first use
    run_dir: str = ""  # where the run is written; default runs/<task>__<script>__<seed>__<time>
    save_model: bool = False  # write agent.pt at the end, for `python -m utils.evaluate RUN_DIR`
    capture_video: bool = False  # write a video of one episode at every evaluation
    track: bool = False  # mirror the log to Weights & Biases (project expo; pip install wandb)
    eval_every: int = 5_000  # environment steps between evaluations
    eval_episodes: int = 100  # episodes of each evaluation, for the best-of-N policy and for the base policy alone
    log_every: int = 500  # environment steps between rows of training metrics
    checkpoint_every: int = 5_000  # steps between checkpoints; 0: only when stopped and at the end of a phase
    resume: str = ""  # folder of a run that was stopped, to go on with it; its flags are the defaults
    # ---- the task
    max_episode_steps: int = 0  # time limit in actions; 0 keeps the environment's own
    action_repeat: int = 1  # simulator steps per action
    reward_scale: float = 1.0  # rewards of offline and online rows are multiplied by this ...
    reward_shift: float = 0.0  # ... and then this is added
    # ---- the algorithm
    learning_starts: int = 5_000  # environment steps with uniform random actions before anything is trained online
    offline_steps: int = 0  # updates on offline rows alone, before the first environment step; published: 3e6
    utd_ratio: int = 20  # U, critic updates per environment step; the base policy is updated once, on the last slice
    batch_size: int = 256  # B, rows of one slice
    offline_ratio: float = 0.5  # share of offline rows in every slice (0.5: symmetric sampling)
    gamma: float = 0.99  # discount per action
    expectile: float = 0.7  # of Q over the data's actions, for V; published: .9 on AntMaze, .7 elsewhere
    num_action_samples: int = 32  # N, base actions per decision; published: 64 while training, 128 in AntMaze tests
    selection: Literal["argmax", "expectile"] = "argmax"  # of training's actions: best of N, or drawn by V's weights
    num_critics: int = 10  # E, critics of the ensemble; published: 2
    num_min_critics: int = 2  # random critics whose minimum counts, in the ranking and for V
    tau: float = 0.005  # Polyak rate of the target critics, per critic update
    ema_rate: float = 0.001  # rate of the base policy's moving average, per base update
    # ---- networks and optimisers
    hidden_dim: int = 256  # width of critics and V
    hidden_layers: int = 3  # hidden layers of critics and V
    critic_lr: float = 3e-4  # Adam, constant, of critics and V
    base_lr: float = 3e-4  # AdamW, cosine decay to 0
    base_weight_decay: float = 1e-4  # AdamW's weight decay
    lr_decay_steps: int = 3_000_000  # updates until the decayed learning rates reach 0
    base_hidden_dim: int = 256  # width of the base policy
    base_blocks: int = 3  # residual blocks of the base policy
    base_expansion: int = 4  # inner width of a residual block, in base_hidden_dim
    denoising_steps: int = 10  # K, steps from noise to action; published: 5


# ------------------------------------------------------------------------------------------------------ networks


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
        # One Linear on [noisy action, obs, time code], in two products: a shared time code is not copied to every row.
        x_weight, time_weight = self.input.weight.split([x.shape[-1], time_code.shape[-1]], dim=1)
        x = F.linear(x, x_weight) + F.linear(time_code, time_weight, self.input.bias)
        return self.output(F.silu(self.blocks(x)))


class BasePolicy(nn.Module):
    """Diffusion (DDPM): learns to name the noise in a noisy action and removes it in K steps. Imitation only."""

    alpha_bars: Tensor
    times: Tensor

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim = action_dim
        k = torch.arange(1, args.denoising_steps + 1, dtype=torch.float64)
        # Variance-preserving schedule with b_min 0.1 and b_max 10 [code].
        betas = 1 - torch.exp(-0.1 / len(k) - 0.5 * (10 - 0.1) * (2 * k - 1) / len(k) ** 2)  # (K,)
        alpha_bars = torch.cumprod(1 - betas, dim=0)  # (K,)
        self.betas, self.noise_weights = betas.tolist(), (betas / (1 - alpha_bars).sqrt()).tolist()
        self.register_buffer("alpha_bars", alpha_bars.float())
        self.register_buffer("times", k.float().unsqueeze(-1))  # (K, 1)
        self.network = DenoisingNetwork(obs_dim, action_dim, args)

    @compilable
    def loss(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Squared error of the predicted noise, summed over action dimensions, mean over the batch: a scalar."""
        k = torch.randint(len(self.betas), (len(actions),), device=actions.device)
        noise = torch.randn_like(actions)
        alpha_bars = self.alpha_bars[k].unsqueeze(-1)  # (B, 1)
        noisy_actions = alpha_bars.sqrt() * actions + (1 - alpha_bars).sqrt() * noise
        prediction = self.network(noisy_actions, obs, self.network.time_code(self.times[k]))
        return (prediction - noise).square().sum(-1).mean()

    @compilable
    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """One action per observation: (..., O) -> (..., A) in [-1, 1]."""
        x = torch.randn(*obs.shape[:-1], self.action_dim, device=obs.device)
        time_codes = self.network.time_code(self.times)  # (K, W)
        for k in reversed(range(len(self.betas))):
            x = x - self.noise_weights[k] * self.network(x, obs, time_codes[k])
            x = x / math.sqrt(1 - self.betas[k])
            if k > 0:
                x = x + math.sqrt(self.betas[k]) * torch.randn_like(x)
            x = x.clamp(-1, 1)  # x itself, at every step [code]; not the usual clip of the predicted action
        return x


class EnsembleLinear(nn.Module):
    """E independent Linear layers as one batched product: (E, B, I) -> (E, B, J)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = math.sqrt(6 / (in_dim + out_dim))  # Xavier-uniform, every member by itself [code]
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(num, 1, out_dim))

    def forward(self, x: Tensor, drawn: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.baddbmm(drawn(self.bias), x, drawn(self.weight))


class EnsembleLayerNorm(nn.Module):
    """E independent LayerNorms: (E, B, I) -> (E, B, I)."""

    def __init__(self, num: int, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(num, 1, width)), nn.Parameter(torch.zeros(num, 1, width))

    def forward(self, x: Tensor, drawn: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.addcmul(drawn(self.bias), F.layer_norm(x, x.shape[-1:], eps=1e-6), drawn(self.weight))


class Critic(nn.Module):
    """E Q-functions side by side, each an MLP of Linear, LayerNorm, ReLU and a linear head."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.num, widths = args.num_critics, [obs_dim + action_dim] + [args.hidden_dim] * args.hidden_layers
        self.layers = nn.ModuleList(EnsembleLinear(self.num, *io) for io in itertools.pairwise(widths))
        self.norms = nn.ModuleList(EnsembleLayerNorm(self.num, width) for width in widths[1:])
        self.output = EnsembleLinear(self.num, widths[-1], 1)

    def forward(self, obs: Tensor, actions: Tensor, heads: Tensor | None = None) -> Tensor:
        """qs (E, ...) of observations (..., O) and actions (..., A); with `heads` only of those, at their cost only."""
        x = torch.cat([obs, actions], dim=-1).flatten(0, -2)
        x = x.expand(self.num if heads is None else len(heads), *x.shape)  # (E, B, O + A)
        drawn = (lambda p: p) if heads is None else (lambda p: p.index_select(0, heads))  # [heads] is far slower
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x, drawn), drawn))
        return self.output(x, drawn).view(-1, *obs.shape[:-1])

    def random_min(self, obs: Tensor, actions: Tensor, num: int) -> Tensor:
        """q (...): the minimum over `num` heads drawn anew at every call."""
        heads = torch.randperm(self.num, device=obs.device)[:num]
        return self(obs, actions, heads).amin(0)


class Value(nn.Module):
    """V: an MLP of Linear, LayerNorm, ReLU and a linear head, as one of the critics but without the action."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        widths = [obs_dim] + [args.hidden_dim] * args.hidden_layers
        self.layers = nn.ModuleList(linear(i, o) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in widths[1:])
        self.output = linear(widths[-1], 1)

    def forward(self, obs: Tensor) -> Tensor:
        """v (...) of observations (..., O)."""
        x = obs
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.output(x).squeeze(-1)


# -------------------------------------------------------------------------------------------- best-of-N policy


class Agent(nn.Module):
    """All networks, and the policy that takes one of N base actions."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.base_policy = BasePolicy(obs_dim, action_dim, args)
        self.target_base_policy = copy.deepcopy(self.base_policy)  # moving average: acts [idql code]
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic)  # ranks candidates and teaches V
        self.value = Value(obs_dim, args)

    @torch.no_grad()
    def candidates_and_q(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """N base actions (..., N, A) for observations (..., O) and their q (..., N), a minimum over target critics."""
        obs = obs.unsqueeze(-2).expand(*obs.shape[:-1], self.args.num_action_samples, -1)
        candidates = self.target_base_policy.sample(obs)
        return candidates, self.target_critic.random_min(obs, candidates, self.args.num_min_critics)

    @compilable
    @torch.no_grad()
    def best_actions(self, obs: Tensor) -> Tensor:
        """The candidate (..., A) with the highest q: what is evaluated, and by default what acts [idql code]."""
        candidates, q = self.candidates_and_q(obs)
        return take(candidates, q.argmax(-1))

    @compilable
    @torch.no_grad()
    def training_actions(self, obs: Tensor) -> Tensor:
        """Actions (..., A) for the environment: the best, or a sample of the policy that IQL's V implies."""
        if self.args.selection == "argmax":
            return self.best_actions(obs)
        candidates, q = self.candidates_and_q(obs)
        better = q > self.value(obs).unsqueeze(-1)  # V balances the two sides of the expectile with these weights
        weights = torch.where(better, self.args.expectile, 1 - self.args.expectile)  # (..., N) [idql code]
        choice = torch.multinomial(weights.view(-1, weights.shape[-1]), 1).view(weights.shape[:-1])
        return take(candidates, choice)

    forward = best_actions  # agent(obs) acts as in the run's evaluations


def take(candidates: Tensor, choice: Tensor) -> Tensor:
    """The chosen candidates: (..., C, A) and indices (...) -> (..., A)."""
    index = choice[..., None, None].expand(*choice.shape, 1, candidates.shape[-1])
    return candidates.gather(-2, index).squeeze(-2)


# ------------------------------------------------------------------------------------------------------- updates


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Squared difference q - v, weighted by `expectile` where v is too low and by 1 - `expectile` where too high."""
    weight = torch.where(difference > 0, expectile, 1 - expectile)
    return (weight * difference.square()).mean()


@compilable
def value_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): V towards the upper expectile of the target critics' Q over the batch's own actions."""
    with torch.no_grad():
        q = agent.target_critic.random_min(batch.obs, batch.actions, agent.args.num_min_critics)  # (B,)
    v = agent.value(batch.obs)  # (B,)
    loss = expectile_loss(q - v, agent.args.expectile)
    return loss, {"losses/value": loss, "critic/v_mean": v.mean()}


@compilable
def iql_critic_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): squared error, every head towards r + gamma V(s'); no action is sampled."""
    with torch.no_grad():
        next_v = agent.value(batch.next_obs)
        target_q = batch.rewards + agent.args.gamma * (1 - batch.terminations) * next_v  # (B,)
    qs = agent.critic(batch.obs, batch.actions)  # (E, B)
    loss = (qs - target_q).square().mean()
    return loss, {"losses/critic": loss, "critic/q_mean": qs.mean()}


class IDQLOptimizers(NamedTuple):
    base: Optimizer
    value: Optimizer
    critic: Optimizer
    base_decay: LambdaLR


def make_idql_optimizers(agent: Agent, args: Args) -> IDQLOptimizers:
    """Adam for critics and V; weight decay and cosine decay for the base policy, as in EXPO."""
    decay, fused = args.base_weight_decay, True
    base = torch.optim.AdamW(agent.base_policy.parameters(), args.base_lr, weight_decay=decay, fused=fused)
    value = torch.optim.Adam(agent.value.parameters(), args.critic_lr, fused=fused)
    critic = torch.optim.Adam(agent.critic.parameters(), args.critic_lr, fused=fused)

    def cosine(n: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * min(n / args.lr_decay_steps, 1))

    return IDQLOptimizers(base, value, critic, LambdaLR(base, cosine))


def gradient_step(optimizer: Optimizer, loss: Tensor) -> None:
    """One step on the optimizer's own parameters; whatever else the loss depends on gets no gradient."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def move_towards(target: nn.Module, online: nn.Module, rate: float) -> None:
    """target <- target + rate (online - target), for all parameters."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)  # pyright: ignore


def idql_update(agent: Agent, optimizers: IDQLOptimizers, batch: Batch) -> dict[str, Tensor]:
    """U steps of V and critics on the slices of a batch (U, B, ...), then one imitation step on the last slice."""
    info: dict[str, Tensor] = {}
    for u in range(len(batch.rewards)):
        last = Batch(*(field[u] for field in batch))
        loss, value_info = value_loss(agent, last)
        gradient_step(optimizers.value, loss)
        loss, info = iql_critic_loss(agent, last)  # after V's step: the target follows the new V [idql code]
        gradient_step(optimizers.critic, loss)
        move_towards(agent.target_critic, agent.critic, agent.args.tau)
        info |= value_info
    loss = agent.base_policy.loss(last.obs, last.actions)
    gradient_step(optimizers.base, loss)
    optimizers.base_decay.step()
    move_towards(agent.target_base_policy, agent.base_policy, agent.args.ema_rate)
    return {key: value.detach() for key, value in (info | {"losses/base_policy": loss}).items()}


def draw_batch(offline: ReplayBuffer, online: ReplayBuffer, offline_ratio: float, slices: int, rows: int) -> Batch:
    """A batch (U, B, ...) in which every slice has the same share of offline rows [paper Sec. 5]."""
    num_offline = round(offline_ratio * rows) if online.size else rows
    parts = [b.sample(slices, n) for b, n in ((offline, num_offline), (online, rows - num_offline)) if n]
    return Batch(*(torch.cat(fields, dim=1) for fields in zip(*parts, strict=True)))


# ---------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """One run: load the data, learn offline if asked to, then act and learn online."""
    device = cli.setup_torch(args)
    env = make_task_env(args)
    dataset = data.load(args, env)
    obs_dim, action_dim = dataset.obs.shape[1], dataset.actions.shape[1]

    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim, args).to(device)
    optimizers = make_idql_optimizers(agent, args)
    dataset.rewards = args.reward_scale * dataset.rewards + args.reward_shift
    offline = ReplayBuffer.from_dataset(dataset, device)
    online = ReplayBuffer(args.total_timesteps, obs_dim, action_dim, device)
    evaluation = Evaluation(args, device)  # of what acts, and of the base policy alone
    logger = Logger(args, script="baselines.idql")

    with Run(args, logger, agent, optimizers, offline, online) as run:  # logs, saves, guards, resumes
        # The same update on offline rows alone, before the first environment step. Logged at steps below 0.
        for _ in run.steps(range(-args.offline_steps, 0), "offline", "update"):
            logger.add(idql_update(agent, optimizers, draw_batch(offline, online, 1.0, 1, args.batch_size)))

        obs, episodic_return = run.first_obs(env)
        for step in run.steps(range(1, args.total_timesteps + 1), "online", "step"):
            if (step - 1) % args.eval_every == 0:  # before acting, so that a run stopped in here has lost nothing
                evaluation.run(logger, step - 1, agent, agent.target_base_policy.sample)
            if step <= args.learning_starts:
                action = 2 * torch.rand(action_dim) - 1
            else:
                action = agent.training_actions(torch.as_tensor(obs, device=device).unsqueeze(0)).squeeze(0).cpu()
            next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
            online.add(obs, action, args.reward_scale * float(reward) + args.reward_shift, next_obs, terminated)
            obs, episodic_return = next_obs, episodic_return + float(reward)
            if terminated or truncated:
                logger.add({"charts/episodic_return": episodic_return})
                obs, episodic_return = run.next_obs(env), 0.0

            if step > args.learning_starts:
                batch = draw_batch(offline, online, args.offline_ratio, args.utd_ratio, args.batch_size)
                logger.add(idql_update(agent, optimizers, batch))
        evaluation.run(logger, args.total_timesteps, agent, agent.target_base_policy.sample)
        if args.save_model:
            logger.save("agent.pt", {"agent": agent.state_dict(), "obs_dim": obs_dim, "action_dim": action_dim})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
