"""EXPO with a flow-matching base policy: sample-efficient online RL that starts from offline data, in one file.

Paper: Stable Reinforcement Learning with Expressive Policies, arXiv 2507.07986. Its code: github.com/pd-perry/EXPO.
Docs: docs/expo_flow.md (every [ours] below has a numbered entry there).

    python expo_flow.py                                   # learns a maze in minutes on a laptop CPU
    python expo_flow.py --task pointmaze-large --seed 1   # another task; --help shows a task's defaults
    python expo_flow.py --env-id Pusher-v5 --dataset my_data.hdf5

Two policies share the work. The *base policy* is expressive and only ever imitates the replay data: no value gradient
flows through its denoising chain. The *edit policy* is a small Gaussian that moves a base action, by `edit_scale` at
most, towards higher Q. The policy that acts, and that the TD target follows, is built on the fly: sample base actions,
edit them, and take the candidate with the highest Q.

Shapes: B batch, O observation, A action, N base samples, M edited samples, C = N + M candidates, E critics, K denoising
steps, U critic updates per environment step (UTD).  Tags: [paper Sec. n], [code] = the authors' code, [ours].
Siblings, made to be read with `diff`: expo_diffusion.py differs in BasePolicy, expo_finetune.py pretrains it first.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
    precision: Literal["float32", "bfloat16"] = "float32"  # of the candidates in the TD target, and of nothing else
    run_dir: str = ""  # where the run is written; default runs/<task>__<script>__<seed>__<time>
    save_model: bool = False  # write agent.pt at the end, for `python -m utils.evaluate RUN_DIR`
    capture_video: bool = False  # write a video of one episode at every evaluation
    track: bool = False  # mirror the log to Weights & Biases (project expo; pip install wandb)
    eval_every: int = 5_000  # environment steps between evaluations
    eval_episodes: int = 100  # episodes of each evaluation, for the on-the-fly policy and for the base policy alone
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
    offline_steps: int = 0  # [ours 3] updates on offline rows alone, before the first environment step
    utd_ratio: int = 20  # U, critic updates per environment step; the policies are updated once, on the last slice
    batch_size: int = 256  # B, rows of one slice
    offline_ratio: float = 0.5  # share of offline rows in every slice (0.5: symmetric sampling)
    gamma: float = 0.99  # discount per action
    num_base_samples: int = 8  # N, base actions per decision
    num_edit_samples: int = 8  # M, edited actions per decision; 0 is best of N without edits [ours 5]
    edit_scale: float = 0.05  # bound of an edit, the flag that matters: .01-.15 to refine, .4-.7 to explore
    edit_dropout: float = 0.0  # dropout of the edit policy in its own loss (0.1 on Adroit)
    edit_entropy: Literal["scaled", "published"] = "scaled"  # target -A/2, or within reach [ours 1]
    init_alpha: float = 1.0  # first entropy temperature of the edit policy
    backup: Literal["hard", "entropy"] = "hard"  # best candidate, or a softmax choice [paper Sec. 4.3]
    backup_kappa: float = 10.0  # entropy backup: candidates are chosen with softmax(kappa Q)
    backup_alpha: float = 0.1  # entropy backup: weight of -log probability of the choice in the target
    num_critics: int = 10  # E, critics of the ensemble
    num_min_critics: int = 2  # random critics whose minimum counts, in the ranking and in the target (1 on AntMaze)
    tau: float = 0.005  # Polyak rate of the target critics, per critic update
    refresh_share: float = 1.0  # [ours 6] below 1, TD targets keep their base samples and only this share is drawn anew
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
    base_expansion: int = 4  # inner width of a residual block, in base_hidden_dim
    denoising_steps: int = 10  # K, steps from noise to action


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
    """Flow matching: learns the velocity from noise to action and follows it in K Euler steps. Imitation only."""

    times: Tensor

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim = action_dim
        self.register_buffer("times", torch.arange(args.denoising_steps).unsqueeze(-1) / args.denoising_steps)  # (K, 1)
        self.network = DenoisingNetwork(obs_dim, action_dim, args)

    @compilable
    def loss(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Squared error of the predicted velocity, summed over action dimensions, mean over the batch: a scalar."""
        # Time runs from noise (0) to action (1) and is uniform; pi0 runs it the other way, with t ~ Beta(1.5, 1).
        t = torch.rand(len(actions), 1, device=actions.device)
        noise = torch.randn_like(actions)
        noisy_actions = (1 - t) * noise + t * actions
        prediction = self.network(noisy_actions, obs, self.network.time_code(t))
        return (prediction - (actions - noise)).square().sum(-1).mean()

    @compilable
    @torch.no_grad()
    def sample(self, obs: Tensor) -> Tensor:
        """One action per observation: (..., O) -> (..., A) in [-1, 1]."""
        x = torch.randn(*obs.shape[:-1], self.action_dim, device=obs.device)
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


# -------------------------------------------------------------------------------------------- on-the-fly policy


class Agent(nn.Module):
    """All networks, and the policy that is built from them on the fly."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.base_policy = BasePolicy(obs_dim, action_dim, args)
        self.target_base_policy = copy.deepcopy(self.base_policy)  # moving average: acts
        self.edit_policy = EditPolicy(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic)  # ranks candidates and makes the TD target
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.init_alpha)))
        # An edit's entropy is at most A log(2 edit_scale): below edit_scale .303 the published target is out of reach,
        # alpha grows without bound and the edits decay to noise. The scaled target [ours 1] moves with the bound.
        scaled = math.log(args.edit_scale) if args.edit_entropy == "scaled" else 0.0
        self.target_entropy = action_dim * (scaled - 0.5)

    @compilable
    @torch.no_grad()
    def base_actions(self, obs: Tensor, base_policy: BasePolicy) -> Tensor:
        """N base actions (..., N, A) for observations (..., O)."""
        return base_policy.sample(obs.unsqueeze(-2).expand(*obs.shape[:-1], self.args.num_base_samples, -1))

    @compilable
    @torch.no_grad()
    def with_edits(self, obs: Tensor, base_actions: Tensor) -> Tensor:
        """Candidates (..., C, A) for observations (..., O): the base actions (..., N, A), then M edited ones."""
        n, m = self.args.num_base_samples, self.args.num_edit_samples
        if m == 0:
            return base_actions
        to_edit = base_actions[..., torch.arange(m, device=obs.device) % n, :]  # (..., M, A), every base action in turn
        edits, _ = self.edit_policy(obs.unsqueeze(-2).expand(*obs.shape[:-1], m, -1), to_edit)
        edited_actions = (to_edit + edits).clamp(-1, 1)  # [ours 2] the code leaves them unclipped
        return torch.cat([base_actions, edited_actions], dim=-2)

    @torch.no_grad()
    def rank(self, obs: Tensor, candidates: Tensor) -> Tensor:
        """q (..., C) of the candidates: minimum over one random subset of target critics [code]."""
        obs = obs.unsqueeze(-2).expand(*candidates.shape[:-1], -1)
        return self.target_critic.random_min(obs, candidates, self.args.num_min_critics)

    @compilable
    def on_the_fly_actions(self, obs: Tensor) -> Tensor:
        """The best candidate (..., A): acts and evaluates, with the moving average of the base policy [code]."""
        candidates = self.with_edits(obs, self.base_actions(obs, self.target_base_policy))
        return take(candidates, self.rank(obs, candidates).argmax(-1))

    forward = on_the_fly_actions  # agent(obs) acts


def take(candidates: Tensor, choice: Tensor) -> Tensor:
    """The chosen candidates: (..., C, A) and indices (...) -> (..., A)."""
    index = choice[..., None, None].expand(*choice.shape, 1, candidates.shape[-1])
    return candidates.gather(-2, index).squeeze(-2)


# ------------------------------------------------------------------------------------------------------- updates


def in_parts(agent: Agent, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs) on rows (n, ...), as many at a time as a CPU's cache or a GPU can hold, in --precision."""
    device, precision = inputs[0].device.type, agent.args.precision
    rows = max(2048 // agent.args.num_base_samples, 1) if device == "cpu" else 16_384
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        return torch.cat([function(*part) for part in zip(*(x.split(rows) for x in inputs), strict=True)]).float()


def sample_next(agent: Agent, next_obs: Tensor) -> Tensor:
    """Base actions (n, N, A) of TD targets at next_obs (n, O), from the online base policy [code]."""
    return in_parts(agent, lambda obs: agent.base_actions(obs, agent.base_policy), next_obs)


def refresh(agent: Agent, offline: ReplayBuffer, online: ReplayBuffer, offline_ratio: float, draws: int) -> None:
    """Before `draws` rows are drawn: a --refresh-share as many, in rotation, get new base actions to keep [ours 6]."""
    for buffer, ratio in ((offline, offline_ratio), (online, 1 - offline_ratio)):
        rows = buffer.next_turns(math.ceil(agent.args.refresh_share * ratio * draws))  # none if none are kept
        if len(rows):
            buffer.data.next_base_actions[rows] = sample_next(agent, buffer.data.next_obs[rows])


def next_candidates(agent: Agent, batch: Batch) -> Tensor:
    """Candidates (U, B, C, A) of the TD targets, for all critic steps at once."""
    obs, kept = batch.next_obs.flatten(0, 1), batch.next_base_actions.flatten(0, 1)
    base_actions = kept if kept.shape[-2] else sample_next(agent, obs)
    return in_parts(agent, agent.with_edits, obs, base_actions).unflatten(0, batch.next_obs.shape[:2])


@torch.no_grad()
def td_target(agent: Agent, batch: Batch, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """target_q (B,) and the index (B,) of the candidate (B, C, A) that the on-the-fly policy takes at next_obs."""
    args = agent.args
    q = agent.rank(batch.next_obs, candidates)  # (B, C)
    if args.backup == "hard":
        choice, bonus = q.argmax(-1), 0.0
    else:  # [paper Sec. 4.3]
        log_probs = F.log_softmax(args.backup_kappa * q, dim=-1)
        choice = torch.multinomial(log_probs.exp(), 1).squeeze(-1)
        bonus = -args.backup_alpha * log_probs.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    next_actions = take(candidates, choice)
    next_q = agent.target_critic.random_min(batch.next_obs, next_actions, args.num_min_critics)  # a fresh subset
    return batch.rewards + args.gamma * (1 - batch.terminations) * (next_q + bonus), choice


@compilable
def critic_loss(agent: Agent, batch: Batch, candidates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): squared TD error, every head towards the same target [paper Sec. 4.2]."""
    target_q, choice = td_target(agent, batch, candidates)
    qs = agent.critic(batch.obs, batch.actions)  # (E, B)
    loss = (qs - target_q).square().mean()
    selected = (choice >= agent.args.num_base_samples).float().mean()
    return loss, {"losses/critic": loss, "critic/q_mean": qs.mean(), "edit/selected_share": selected}


@compilable
def edit_policy_loss(agent: Agent, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, info): SAC's objective, on edits of the batch's actions, not of fresh base samples [code]."""
    edits, log_prob = agent.edit_policy(batch.obs, batch.actions, train=True)
    q = agent.critic(batch.obs, (batch.actions + edits).clamp(-1, 1)).mean(0)  # all online heads [code]
    alpha, entropy = agent.log_alpha.exp(), -log_prob.mean()
    loss = (alpha.detach() * log_prob - q).mean()
    info = {"edit/alpha": alpha, "edit/entropy": entropy, "edit/abs_mean": edits.abs().mean()}
    return loss, {"losses/edit_policy": loss, **info}


def alpha_loss(agent: Agent, entropy: Tensor) -> Tensor:
    """SAC's temperature: alpha grows while the entropy is below its target, and falls above it."""
    return agent.log_alpha.exp() * (entropy.detach() - agent.target_entropy)


class Optimizers(NamedTuple):
    base: Optimizer
    edit: Optimizer
    critic: Optimizer
    alpha: Optimizer
    base_decay: LambdaLR
    edit_decay: LambdaLR


def make_optimizers(agent: Agent, args: Args) -> Optimizers:
    """Adam for everything; weight decay for the base policy; cosine decay for base and edit policy [code]."""
    decay, fused = args.base_weight_decay, True
    base = torch.optim.AdamW(agent.base_policy.parameters(), args.base_lr, weight_decay=decay, fused=fused)
    edit = torch.optim.Adam(agent.edit_policy.parameters(), args.edit_lr, fused=fused)
    critic = torch.optim.Adam(agent.critic.parameters(), args.critic_lr, fused=fused)
    alpha = torch.optim.Adam([agent.log_alpha], args.alpha_lr, fused=fused)

    def cosine(n: int) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * min(n / args.lr_decay_steps, 1))

    return Optimizers(base, edit, critic, alpha, LambdaLR(base, cosine), LambdaLR(edit, cosine))


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


def update_base_policy(agent: Agent, optimizers: Optimizers, obs: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """One imitation step on (B, O), (B, A), good and bad rows alike, and one of the moving average."""
    loss = agent.base_policy.loss(obs, actions)
    gradient_step(optimizers.base, loss)
    optimizers.base_decay.step()
    move_towards(agent.target_base_policy, agent.base_policy, agent.args.ema_rate)
    return {"losses/base_policy": loss}


def update(agent: Agent, optimizers: Optimizers, batch: Batch) -> dict[str, Tensor]:
    """U critic steps on the slices of a batch (U, B, ...), then one step of each policy on the last slice [code]."""
    candidates = next_candidates(agent, batch)  # base and edit policy stand still while the critics learn
    info: dict[str, Tensor] = {}
    for u in range(len(candidates)):
        last = Batch(*(field[u] for field in batch))
        loss, info = critic_loss(agent, last, candidates[u])
        gradient_step(optimizers.critic, loss)
        move_towards(agent.target_critic, agent.critic, agent.args.tau)
    info |= update_base_policy(agent, optimizers, last.obs, last.actions)
    if agent.args.num_edit_samples:
        loss, edit_info = edit_policy_loss(agent, last)
        gradient_step(optimizers.edit, loss)
        gradient_step(optimizers.alpha, alpha_loss(agent, edit_info["edit/entropy"]))
        optimizers.edit_decay.step()
        info |= edit_info
    return {key: value.detach() for key, value in info.items()}


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
    optimizers = make_optimizers(agent, args)
    dataset.rewards = args.reward_scale * dataset.rewards + args.reward_shift
    kept = args.num_base_samples if args.refresh_share < 1 else 0  # beside every transition
    offline = ReplayBuffer.from_dataset(dataset, device, kept)
    online = ReplayBuffer(args.total_timesteps, obs_dim, action_dim, device, kept)
    evaluation = Evaluation(args, device)  # of what acts, and of the base policy alone
    logger = Logger(args, script="expo_flow")

    with Run(args, logger, agent, optimizers, offline, online) as run:  # logs, saves, guards, resumes
        # The same update on offline rows alone, before the first environment step [ours 3]. Logged at steps below 0.
        for _ in run.steps(range(-args.offline_steps, 0), "offline", "update"):
            refresh(agent, offline, online, 1.0, args.batch_size)
            logger.add(update(agent, optimizers, draw_batch(offline, online, 1.0, 1, args.batch_size)))

        obs, episodic_return = run.first_obs(env)
        for step in run.steps(range(1, args.total_timesteps + 1), "online", "step"):
            if (step - 1) % args.eval_every == 0:  # before acting, so that a run stopped in here has lost nothing
                evaluation.run(logger, step - 1, agent.on_the_fly_actions, agent.target_base_policy.sample)
            if step <= args.learning_starts:
                action = 2 * torch.rand(action_dim) - 1
            else:
                action = agent.on_the_fly_actions(torch.as_tensor(obs, device=device).unsqueeze(0)).squeeze(0).cpu()
            next_obs, reward, terminated, truncated, _ = env.step(action.numpy())
            online.add(obs, action, args.reward_scale * float(reward) + args.reward_shift, next_obs, terminated)
            obs, episodic_return = next_obs, episodic_return + float(reward)
            if terminated or truncated:  # only the former is stored as an end [ours 4]
                logger.add({"charts/episodic_return": episodic_return})
                obs, episodic_return = run.next_obs(env), 0.0

            if step > args.learning_starts:
                refresh(agent, offline, online, args.offline_ratio, args.utd_ratio * args.batch_size)
                batch = draw_batch(offline, online, args.offline_ratio, args.utd_ratio, args.batch_size)
                logger.add(update(agent, optimizers, batch))
        evaluation.run(logger, args.total_timesteps, agent.on_the_fly_actions, agent.target_base_policy.sample)
        if args.save_model:
            logger.save("agent.pt", {"agent": agent.state_dict(), "obs_dim": obs_dim, "action_dim": action_dim})


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
