"""expo_diffusion.py against numbers of the authors' own JAX learner; tests/data/authors_reference.md says how.

Weights, a batch and every random number are put into the script, which then runs in float64. What it computes must
agree to 1e-9. Nothing of the script is replaced but its random numbers. One test takes out our two clips.
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CLIPS = "(to_edit + edits).clamp(-1, 1)", "(batch.actions + edits).clamp(-1, 1)"
FIELDS = ("obs", "actions", "rewards", "next_obs", "terminations")
Numbers = dict[str, Tensor]


@pytest.fixture(scope="module")
def ref() -> Numbers:
    with np.load(ROOT / "tests" / "data" / "authors_reference.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def script(clips: bool = True) -> ModuleType:
    """The script as a module of its own, so that a test may change it; without its two clips if asked to."""
    source = (ROOT / "expo_diffusion.py").read_text()
    for clip in () if clips else CLIPS:
        assert source.count(clip) == 1
        source = source.replace(clip, clip.removesuffix(".clamp(-1, 1)"))
    module = sys.modules["script_of_this_test"] = ModuleType("script_of_this_test")
    module.__file__ = str(ROOT / "expo_diffusion.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def weights(agent: Any) -> Numbers:
    """Every parameter, under its name and in its layout in the file. They are views: they can be set."""
    found: Numbers = {"log_alpha": agent.log_alpha.data}
    layers: dict[str, Any] = {}
    for name, policy in (("base", agent.base_policy), ("base_ema", agent.target_base_policy)):
        net = policy.network
        found[f"{name}/time_frequencies"] = net.frequencies.data
        layers |= {f"{name}/time_in": net.time_mlp[0], f"{name}/time_out": net.time_mlp[2]}
        layers |= {f"{name}/input": net.input, f"{name}/output": net.output}
        for i, block in enumerate(net.blocks):
            layers |= {f"{name}/block{i}/widen": block.widen, f"{name}/block{i}/narrow": block.narrow}
            found[f"{name}/block{i}/norm/scale"] = block.norm.weight.data
            found[f"{name}/block{i}/norm/bias"] = block.norm.bias.data
    layers |= {"edit/mean": agent.edit_policy.mean, "edit/log_std": agent.edit_policy.log_std}
    layers |= {f"edit/layer{i}": layer for i, layer in enumerate(agent.edit_policy.layers)}
    for name, layer in layers.items():
        found |= {f"{name}/weight": layer.weight.data.T, f"{name}/bias": layer.bias.data}
    for name, critic in (("critic", agent.critic), ("critic_ema", agent.target_critic)):
        for i, weight in enumerate(critic.weights):
            key = f"{name}/layer{i}" if i < len(critic.scales) else f"{name}/output"
            found |= {f"{key}/weight": weight.data, f"{key}/bias": critic.biases[i].data.squeeze(1)}
        for i, scale in enumerate(critic.scales):
            found |= {f"{name}/norm{i}/scale": scale.data.squeeze(1)}
            found |= {f"{name}/norm{i}/bias": critic.shifts[i].data.squeeze(1)}
    return found


def make_agent(module: ModuleType, ref: Numbers, target: str = "published", prefix: str = "") -> Any:
    """An agent with the settings and the initial weights of the file."""
    setting = {key.removeprefix("setting/"): value.item() for key, value in ref.items() if key.startswith("setting/")}
    same = "num_critics num_min_critics num_base_samples num_edit_samples denoising_steps base_blocks base_expansion"
    flags: dict[str, Any] = {key: setting[key] for key in f"{same} hidden_layers edit_scale gamma tau ema_rate".split()}
    flags |= {"base_hidden_dim": setting["base_width"], "hidden_dim": setting["hidden_width"]}
    flags |= {"base_lr": setting["policy_lr"], "edit_lr": setting["policy_lr"], "critic_lr": setting["critic_lr"]}
    flags |= {"alpha_lr": setting["alpha_lr"], "base_weight_decay": setting["weight_decay"], "edit_entropy": target}
    args = module.Args(**flags, lr_decay_steps=setting["lr_decay_updates"])
    agent = module.Agent(setting["obs_dim"], setting["action_dim"], args)
    for key, value in weights(agent).items():
        value.copy_(ref.get(f"{prefix}init/{key}", ref[f"init/{key}"]))
    return agent


class Draws:
    """Random numbers in the order in which the script asks for them. Another kind or shape is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.queue: list[tuple[str, Tensor]] = []
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: self.next("normal", shape))
        monkeypatch.setattr(torch, "randn_like", lambda x: self.next("normal", x.shape))
        monkeypatch.setattr(torch, "randint", lambda _, shape, **__: self.next("times", shape))
        monkeypatch.setattr(torch, "randperm", lambda *_, **__: self.next("heads", (2,)))

    def next(self, kind: str, shape: Any) -> Tensor:
        expected, value = self.queue.pop(0)
        assert (kind, tuple(shape)) == (expected, tuple(value.shape))
        return value

    def put(self, kind: str, *values: Tensor) -> None:
        self.queue += [(kind, value) for value in values]

    def put_update(self, n: Numbers) -> None:
        """Those of a whole update: first the candidates of all slices, then slice by slice, then the two policies."""
        self.put("normal", n["chain_start"].flatten(0, 1), *n["chain_noise"].transpose(0, 1).flatten(1, 2))
        self.put("normal", n["edit_noise"].flatten(0, 1))
        for rank_heads, target_heads in zip(n["rank_heads"], n["target_heads"], strict=True):
            self.put("heads", rank_heads, target_heads)
        self.put("times", n["loss_times"])
        self.put("normal", n["loss_noise"], n["edit_loss_noise"])


def watched_update(module: ModuleType, agent: Any, optimizers: Any, batch: Any) -> Numbers:
    """One call of the script's `update`, and what its functions returned on the way: a row per critic step."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(owner: Any, name: str, *keys: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any) -> Any:
            result = function(*args)
            for key, value in zip(keys, result if isinstance(result, tuple) else (result,), strict=False):
                seen[key].append(value)
            return result

        setattr(owner, name, call)

    def gradient_step(optimizer: Any, loss: Tensor) -> None:
        step(optimizer, loss)
        name = next(name for name, part in vars(optimizers).items() if part is optimizer)
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        seen[f"{name}_grad_norm"].append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
        seen[f"{name}_grad"].append(gradients[0].clone())

    before = dict(vars(module))
    watch(module, "next_candidates", "candidates")
    watch(agent, "rank", "rank_q")
    watch(agent, "td_target", "target_q", "choice")
    watch(agent, "critic_loss", "critic_loss")
    step, module.gradient_step = module.gradient_step, gradient_step  # pyright: ignore[reportAttributeAccessIssue]
    info = module.update(agent, optimizers, batch)
    vars(module).update(before)
    for name in ("rank", "td_target", "critic_loss"):
        delattr(agent, name)
    found = {key: torch.stack(values).detach() for key, values in seen.items()}
    names = {"base_loss": "losses/base_policy", "edit_loss": "losses/edit_policy", "alpha": "edit/alpha"}
    found |= {name: info[key] for name, key in (names | {"entropy": "edit/entropy"}).items()}
    for name in ("candidates", "base_grad_norm", "edit_grad_norm"):
        found[name] = found[name][0]
    return found | {"log_alpha_grad": found["alpha_grad"][0], "log_alpha_after": agent.log_alpha.detach().clone()}


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert found.shape == expected.shape, name
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max(), name


VALUES = (
    "candidates rank_q choice target_q critic_loss critic_grad_norm base_loss base_grad_norm edit_loss edit_grad_norm"
)
VALUES += " entropy alpha log_alpha_grad log_alpha_after"


@pytest.mark.parametrize("name, target", [("published", "published"), ("adjusted", "scaled"), ("outside", "published")])
def test_whole_updates(ref, monkeypatch, name, target):
    module = script(clips=name != "outside")
    agent = make_agent(module, ref, target, f"{name}/" if name == "outside" else "")
    optimizers = module.Optimizers(agent, agent.args)
    batch = module.Batch(*(ref.get(f"{name}/batch/{key}", ref[f"batch/{key}"]) for key in FIELDS))
    draws, compared = Draws(monkeypatch), 0
    for r in range(1 if name == "outside" else 5):
        draws.put_update({key.removeprefix("random/"): x[r] for key, x in ref.items() if key.startswith("random/")})
        found = watched_update(module, agent, optimizers, batch)
        assert not draws.queue
        for key in VALUES.split():
            expected = ref[f"{name}/{key}"]
            assert_close(found[key], expected if name == "outside" else expected[r], f"{key} of update {r}")
        for key, value in weights(agent).items():
            expected = ref.get(f"{name}/after{r + 1}/{key}", ref.get(f"published/after{r + 1}/{key}"))
            if expected is not None and not (name == "outside" and key.startswith("base")):
                assert_close(value, expected, f"{key} after update {r + 1}")
                compared += 1
    # The file has all weights after 1 and 5 updates; of `outside` those of edit policy, critics and alpha after 1.
    assert compared == {"published": 2 * len(weights(agent)), "adjusted": 2 * len(weights(agent)), "outside": 29}[name]


def test_acting(ref, monkeypatch):
    agent = make_agent(script(), ref)
    draws = Draws(monkeypatch)
    n = {key.removeprefix("acting/"): value for key, value in ref.items() if key.startswith("acting/")}
    draws.put("normal", n["chain_start"], *n["chain_noise"], n["edit_noise"])
    draws.put("heads", n["rank_heads"])
    seen: list[Tensor] = []
    rank = agent.rank
    agent.rank = lambda obs, candidates: seen.extend([candidates, rank(obs, candidates)]) or seen[-1]
    assert_close(agent.on_the_fly_actions(n["obs"]), n["action"], "action")
    assert_close(seen[0], n["candidates"], "candidates")
    assert_close(seen[1], n["rank_q"], "rank_q")
    assert seen[1].argmax() == n["choice"]


def test_single_networks(ref, monkeypatch):
    agent = make_agent(script(), ref)
    n = {key.removeprefix("probe/"): value for key, value in ref.items() if key.startswith("probe/")}
    for name, policy in (("base", agent.base_policy), ("base_ema", agent.target_base_policy)):
        time_code = policy.network.time_code(policy.times[n["times"]])
        assert_close(policy.network(n["actions"], n["obs"], time_code).detach(), n[name], name)
    draws = Draws(monkeypatch)
    draws.put("normal", n["edit_noise"], torch.zeros_like(n["edit_noise"]))
    edit, log_density = agent.edit_policy(n["obs"], n["actions"])
    assert_close(edit.detach(), n["edit"], "edit")
    assert_close(log_density.detach(), n["edit_log_density"], "edit_log_density")
    agent.edit_policy.log_std.bias.data += n["log_std_shift"]  # beyond both of its bounds
    edit, log_density = agent.edit_policy(n["obs"], n["actions"])  # without noise: the mean itself
    density = torch.distributions.Normal(n["edit_mean"], n["edit_std_shifted"]).log_prob(n["edit_mean"])
    slope = agent.args.edit_scale * (1 - n["edit_mean"].tanh().square())
    assert_close(edit.detach(), agent.args.edit_scale * n["edit_mean"].tanh(), "edit_mean")
    assert_close(log_density.detach(), (density - slope.log()).sum(-1), "edit_std_shifted")
    assert_close(agent.critic(n["obs"], n["actions"]).detach(), n["critic"], "critic")
    assert_close(agent.target_critic(n["obs"], n["actions"]).detach(), n["critic_ema"], "critic_ema")


@pytest.mark.parametrize("steps", [4, 10])
def test_schedule(ref, steps):
    module = script()
    policy = module.BasePolicy(5, 3, module.Args(denoising_steps=steps))
    assert_close(torch.tensor(policy.betas), ref[f"schedule/betas_{steps}"], "betas")
    assert_close(policy.alpha_bars, ref[f"schedule/alpha_bars_{steps}"], "alpha_bars")
