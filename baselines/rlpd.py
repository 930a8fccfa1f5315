"""RLPD, a baseline: SAC that learns online from symmetric batches of its own and of offline rows, in one file.

Paper: Efficient Online Reinforcement Learning with Offline Data (Ball et al. 2023), arXiv 2302.02948. Its code,
github.com/ikostrikov/rlpd, is [rlpd code] below; a bare [code] stands in definitions shared with EXPO and means EXPO's.

    python baselines/rlpd.py                                   # the quickstart maze, as expo_diffusion.py learns it
    python baselines/rlpd.py --task pointmaze-large --seed 1   # another task; --help shows a task's defaults
    python baselines/rlpd.py --env-id Pusher-v5 --dataset my_data.hdf5

How it differs from expo_diffusion.py: there is no imitation. One tanh-Gaussian actor replaces base and edit policy, it
follows the value gradient alone, and it acts and makes the TD target by itself: nothing is ranked. Critics, buffers,
symmetric batches, UTD and the loop are EXPO's, which took them from here. Training samples the actor; evaluation, and
`agent(obs)`, take its mode [rlpd code].

Shapes: B batch, O observation, A action, E critics, U critic updates per environment step (UTD).
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/rlpd.py` finds utils/ this way

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
    eval_episodes: int = 100  # episodes of each evaluation, for the mode of the actor
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
    offline_steps: int = 0  # updates on offline rows alone, before the first environment step; published: none
    utd_ratio: int = 20  # U, critic updates per environment step; the actor is updated once, on the last slice
    batch_size: int = 256  # B, rows of one slice
    offline_ratio: float = 0.5  # share of offline rows in every slice (0.5: symmetric sampling)
    gamma: float = 0.99  # discount per action
    init_alpha: float = 1.0  # first entropy temperature [rlpd code]
    backup_entropy: bool = False  # entropy in the TD target; published: off on AntMaze and Adroit, on for locomotion
    num_critics: int = 10  # E, critics of the ensemble
    num_min_critics: int = 2  # random critics whose minimum counts in the target (1 on AntMaze)
    tau: float = 0.005  # Polyak rate of the target critics, per critic update
    # ---- networks and optimisers
    hidden_dim: int = 256  # width of critics and actor
    hidden_layers: int = 3  # hidden layers of critics and actor (published: 3 on AntMaze and Adroit, else 2)
    critic_lr: float = 3e-4  # Adam, constant
    actor_lr: float = 3e-4  # Adam, constant
    alpha_lr: float = 3e-4  # Adam, constant


# ------------------------------------------------------------------------------------------------------ networks


def linear(in_dim: int, out_dim: int, init=nn.init.xavier_uniform_) -> nn.Linear:
    """A Linear layer with the weights drawn by `init` and zero bias [code]."""
    layer = nn.Linear(in_dim, out_dim)
    init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Actor(nn.Module):
    """Tanh-Gaussian policy with diagonal covariance, an MLP with ReLU."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        widths = [obs_dim] + [args.hidden_dim] * args.hidden_layers
        self.layers = nn.ModuleList(linear(i, o) for i, o in itertools.pairwise(widths))
        self.mean = linear(widths[-1], action_dim)
        self.log_std = linear(widths[-1], action_dim)

    def gaussian(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, both (..., A), before the tanh."""
        x = obs
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.mean(x), self.log_std(x).clamp(-20, 2)  # bounds of [rlpd code]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Sampled actions (..., A), with gradient, and their log-density (...), for observations (..., O)."""
        mean, log_std = self.gaussian(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)  # of u, per dimension
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))  # of tanh(u): minus log(1 - tanh(u)^2)
        return u.tanh(), log_prob.sum(-1)


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


# -------------------------------------------------------------------------------------------------------- policy


class Agent(nn.Module):
    """All networks, and the actor's two ways to act."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        self.target_entropy = -action_dim / 2  # [rlpd code]

    @compilable
    @torch.no_grad()
    def sample_actions(self, obs: Tensor) -> Tensor:
        """Sampled actions (..., A): what training does in the environment."""
        return self.actor(obs)[0]

    @compilable
    @torch.no_grad()
    def mode_actions(self, obs: Tensor) -> Tensor:
        """The tanh of the mean (..., A): what is evaluated."""
        return self.actor.gaussian(obs)[0].tanh()

    forward = mode_actions  # agent(obs) acts as in the run's evaluations


# ------------------------------------------------------------------------------------------------------- updates


@torch.no_grad()
def soft_td_target(agent: Agent, batch: Batch) -> Tensor:
    """target_q (B,): SAC's, with the minimum over a random subset of target heads and the entropy on request."""
    args = agent.args
    next_actions, log_prob = agent.actor(batch.next_obs)
    next_q = agent.target_critic.random_min(batch.next_obs, next_actions, args.num_min_critics)
    if args.backup_entropy:
        next_q = next_q - agent.log_alpha.exp() * log_prob
    return batch.rewards + args.gamma * (1 - batch.terminations) * next_q


@compilable
def soft_critic_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): squared TD error, every head towards the same target."""
    target_q = soft_td_target(agent, batch)
    qs = agent.critic(batch.obs, batch.actions)  # (E, B)
    loss = (qs - target_q).square().mean()
    return loss, {"losses/critic": loss, "critic/q_mean": qs.mean()}


@compilable
def actor_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): SAC's objective, with the mean over all online heads [rlpd code]."""
    actions, log_prob = agent.actor(batch.obs)
    q = agent.critic(batch.obs, actions).mean(0)
    alpha, entropy = agent.log_alpha.exp(), -log_prob.mean()
    loss = (alpha.detach() * log_prob - q).mean()
    return loss, {"losses/actor": loss, "actor/alpha": alpha, "actor/entropy": entropy}


def alpha_loss(agent: Agent, entropy: Tensor) -> Tensor:
    """SAC's temperature: alpha grows while the entropy is below its target, and falls above it."""
    return agent.log_alpha.exp() * (entropy.detach() - agent.target_entropy)


class SACOptimizers(NamedTuple):
    actor: Optimizer
    critic: Optimizer
    alpha: Optimizer


def make_sac_optimizers(agent: Agent, args: Args) -> SACOptimizers:
    """Adam with constant learning rates for everything [rlpd code]."""
    actor = torch.optim.Adam(agent.actor.parameters(), args.actor_lr, fused=True)
    critic = torch.optim.Adam(agent.critic.parameters(), args.critic_lr, fused=True)
    return SACOptimizers(actor, critic, torch.optim.Adam([agent.log_alpha], args.alpha_lr, fused=True))


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


def sac_update(agent: Agent, optimizers: SACOptimizers, batch: Batch) -> dict[str, Tensor]:
    """U critic steps on the slices of a batch (U, B, ...), then one step of actor and temperature on the last slice."""
    info: dict[str, Tensor] = {}
    for u in range(len(batch.rewards)):
        last = Batch(*(field[u] for field in batch))
        loss, info = soft_critic_loss(agent, last)
        gradient_step(optimizers.critic, loss)
        move_towards(agent.target_critic, agent.critic, agent.args.tau)
    loss, actor_info = actor_loss(agent, last)
    gradient_step(optimizers.actor, loss)
    gradient_step(optimizers.alpha, alpha_loss(agent, actor_info["actor/entropy"]))
    return {key: value.detach() for key, value in (info | actor_info).items()}


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
    optimizers = make_sac_optimizers(agent, args)
    dataset.rewards = args.reward_scale * dataset.rewards + args.reward_shift
    offline = ReplayBuffer.from_dataset(dataset, device)
    online = ReplayBuffer(args.total_timesteps, obs_dim, action_dim, device)
    evaluation = Evaluation(args, device)  # of what acts
    logger = Logger(args, script="baselines.rlpd")

    with Run(args, logger, agent, optimizers, offline, online) as run:  # logs, saves, guards, resumes
        # The same update on offline rows alone, before the first environment step. Logged at steps below 0.
        for _ in run.steps(range(-args.offline_steps, 0), "offline", "update"):
            logger.add(sac_update(agent, optimizers, draw_batch(offline, online, 1.0, 1, args.batch_size)))

        obs, episodic_return = run.first_obs(env)
        for step in run.steps(range(1, args.total_timesteps + 1), "online", "step"):
            if (step - 1) % args.eval_every == 0:  # before acting, so that a run stopped in here has lost nothing
                evaluation.run(logger, step - 1, agent)
            if step <= args.learning_starts:
                action = 2 * torch.rand(action_dim) - 1
            else:
                action = agent.sample_actions(torch.as_tensor(obs, device=device).unsqueeze(0)).squeeze(0).cpu()
            next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
            online.add(obs, action, args.reward_scale * float(reward) + args.reward_shift, next_obs, terminated)
            obs, episodic_return = next_obs, episodic_return + float(reward)
            if terminated or truncated:
                logger.add({"charts/episodic_return": episodic_return})
                obs, episodic_return = run.next_obs(env), 0.0

            if step > args.learning_starts:
                batch = draw_batch(offline, online, args.offline_ratio, args.utd_ratio, args.batch_size)
                logger.add(sac_update(agent, optimizers, batch))
        evaluation.run(logger, args.total_timesteps, agent)
        if args.save_model:
            logger.save("agent.pt", {"agent": agent.state_dict(), "obs_dim": obs_dim, "action_dim": action_dim})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
