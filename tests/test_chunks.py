"""Action chunks: with H = 1 the parent's run; windows by hand; masks; acting, evaluation and video, open loop."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_agent, make_args, make_batch, tiny_run_args
from running import assert_same, read_metrics, read_state, run_here
from test_run import TOY, Walk, random_rows

import expo_flow
from utils.data import read_file, to_dataset
from utils.pointmaze import demonstrations
from variants import expo_chunks as script

CPU = torch.device("cpu")


@pytest.mark.parametrize("flags", [{}, {"backup": "entropy", "num_edit_samples": 0}, {"gamma": 0.0}])
def test_a_chunk_of_one_step_is_the_parents(flags, tmp_path):
    """Update after update, and in a whole run."""
    after: list[Any] = []
    for module, window in ((expo_flow, ()), (script, (1, flags.get("gamma", 0.99)))):
        torch.manual_seed(1)
        agent = module.Agent(2, 1, make_args(module, **flags))
        buffer, optimizers = module.ReplayBuffer(random_rows(), 9, CPU, *window), module.Optimizers(agent, agent.args)
        buffer.add(*(array[:5] for array in random_rows()))
        infos = [module.update(agent, optimizers, buffer.draw(0.5, 3, 8)) for _ in range(4)]
        run_here(module, tiny_run_args(module, tmp_path / module.__name__, chunk_length=1, **flags))
        after.append(
            (infos, agent.state_dict(), *(read(tmp_path / module.__name__) for read in (read_state, read_metrics)))
        )
    assert_same(*after)


# Single steps: obs, reward, next_obs, termination. The action is (obs, -obs).
STEPS = [(1, 8, 2, 0), (2, 4, 3, 0), (3, 2, 4, 0), (4, 1, 5, 1), (5, 8, 6, 0), (6, 4, 7, 0), (8, 2, 8, 0)]  # offline
STEPS += [(8, 8, 9, 0), (9, 4, 10, 0), (0, 2, 0, 0)]  # online; the last next_obs is 0, as the empty rows behind it
# The window from each of them on, H = 3 and gamma = 1/2: length, discounted rewards, next_obs, termination.
WINDOWS = [(3, 8 + 2 + 0.5, 4, 0)]  # inside of an episode
WINDOWS += [(3, 4 + 1 + 0.25, 5, 1), (2, 2 + 0.5, 5, 1), (1, 1, 5, 1)]  # up to the end of the task, and not on to obs 5
WINDOWS += [(2, 8 + 2, 7, 0), (1, 4, 7, 0)]  # up to a time limit: they bootstrap from the last state
WINDOWS += [(3, 2 + 4 + 1, 10, 0)]  # a reset to the very state before it cannot be seen, and ends nothing
WINDOWS += [(2, 8 + 2, 10, 0), (1, 4, 10, 0), (1, 2, 0, 0)]  # up to another reset, and to the end of the data


@pytest.mark.parametrize("parts", [[7, 10], range(7, 11)], ids=["after a resume", "row by row"])
def test_windows_by_hand(parts, monkeypatch):
    o, r, n, d = np.array(STEPS, np.float32).T
    fields = o[:, None], np.stack([o, -o], 1), r, n[:, None], d
    buffer = script.ReplayBuffer(tuple(field[:7] for field in fields), 3, CPU, 3, 0.5)
    for i, j in itertools.pairwise(parts):
        buffer.add(*(field[i:j] if j > i + 1 else field[i] for field in fields))
    index = iter([torch.arange(10)[None], torch.zeros(1, 0, dtype=torch.long)])  # every row once
    monkeypatch.setattr(torch, "randint", lambda *_, **__: next(index))
    batch = buffer.draw(0.5, 1, 10)
    found = batch.lengths, batch.rewards, batch.next_obs[..., 0], batch.terminations
    assert torch.cat(found).T.tolist() == list(map(list, WINDOWS)) and batch.obs.flatten().tolist() == o.tolist()
    for i, (k, *_) in enumerate(WINDOWS):
        assert batch.actions[0, i].tolist() == [sign * x for x in o[i : i + k] for sign in (1, -1)] + [0] * (6 - 2 * k)
        assert batch.mask[0, i].tolist() == [1] * 2 * k + [0] * (6 - 2 * k)


@pytest.mark.parametrize("successors", [True, False])  # without them, the last row of a time limit is dropped
def test_windows_of_a_file_end_where_its_episodes_end(successors):
    arrays = read_file(demonstrations("pointmaze-umaze"))
    data = to_dataset(arrays if successors else {k: v for k, v in arrays.items() if k != "next_observations"})
    assert (data.dropped == 0) == successors and 0 < data.rows.terminations.sum() < len(data.episodes)
    starts = np.flatnonzero(script.ReplayBuffer(data.rows, 0, CPU, 3).follows == 0)
    assert starts[starts < len(data.rows.obs)].tolist() == data.episodes[:, 0].tolist()


def test_losses_leave_out_what_is_behind_the_end():
    """Slow loops over windows of k of 3 steps, with 2 numbers each."""
    agent, lengths = make_agent(script, chunk_length=3, gamma=0.5, edit_scale=0.2), torch.randint(1, 4, (30,))
    mask = (torch.arange(6) < 2 * lengths[:, None]).float()
    batch = make_batch(script, 30, action_dim=6)._replace(mask=mask, lengths=lengths.float())
    batch, policy, total = batch._replace(actions=mask * batch.actions), agent.base_policy, 0.0
    torch.manual_seed(5)
    loss = policy.loss(batch.obs, batch.actions, mask).item()
    torch.manual_seed(5)
    times, noise = torch.rand(30, 1), torch.randn(30, 6)
    agent.edit_policy.forward = lambda *_, **__: (0.1 * torch.ones(30, 6), torch.zeros(30))
    agent.critic.forward, seen = lambda obs, actions: seen.append(actions) or actions.sum(-1)[None], []
    agent.target_critic.random_min = lambda obs, actions, num: torch.full(actions.shape[:-1], 16.0)
    agent.edit_policy_loss(batch)
    y = agent.td_target(batch, torch.zeros(30, 4, 6))[0]
    for i, k in enumerate(lengths.tolist()):
        x, t, z = batch.actions[i], times[i], noise[i]
        wrong = policy.network((1 - t) * z + t * x, batch.obs[i], policy.network.time_code(t)) - (x - z)
        total += sum(wrong[j].item() ** 2 for j in range(2 * k))
        assert seen[0][i].tolist() == pytest.approx([min(v + 0.1, 1) for v in x.tolist()[: 2 * k]] + [0] * (6 - 2 * k))
        future = 0 if batch.terminations[i] else [8, 4, 2][k - 1]
        assert y[i].item() == pytest.approx(batch.rewards[i].item() + future, abs=1e-5)
    assert loss == pytest.approx(total / 30, rel=1e-4)
    assert agent.target_entropy == pytest.approx(-3 * 2 / 2 + 6 * math.log(0.2))
    assert make_agent(script, chunk_length=3).edit_policy(torch.zeros(4, 3), torch.zeros(4, 6))[0].shape == (4, 6)


def decide(obs: torch.Tensor) -> torch.Tensor:
    """Chunks of three steps, which tell for what observation they were decided."""
    return 0.2 * obs[:, :1] + torch.tensor([0.0, 0.1, 0.35])


def play(env: Walk, kind: int, episode: int) -> int:
    """An episode of training (0) or evaluation (1), slowly. Returns its length: 1 to 5, so it may cut a chunk."""
    obs, taken, done, chunk = env.reset(seed=script.episode_seed(1, kind, episode))[0], 0, False, []
    while not done:
        chunk = chunk if taken % 3 else decide(torch.tensor(obs[None]))[0].tolist()
        obs, _, *ends, _ = env.step(np.array([chunk[taken % 3]], np.float32))
        taken, done = taken + 1, any(ends)
    return taken


def test_a_run_acts_is_evaluated_and_is_filmed_open_loop(monkeypatch, tmp_path):
    video: Any = pytest.importorskip("moviepy").VideoFileClip
    monkeypatch.setattr(script, "make_env", lambda *_, **__: Walk())
    monkeypatch.setattr(script, "load_dataset", lambda *_: random_rows())
    monkeypatch.setattr(script.Agent, "on_the_fly_actions", lambda agent, obs: decide(obs))
    flags: Any = {"total_timesteps": 40, "learning_starts": 0, "eval_every": 100, "eval_episodes": 6, "chunk_length": 3}
    flags = {key: value for key, value in (TOY | flags).items() if hasattr(script.Args, key)}
    run_here(script, script.Args(run_dir=str(tmp_path / "run"), capture_video=True, **flags))
    env, lengths = Walk(), []
    while len(env.steps) < 40:
        lengths.append(play(env, 0, len(lengths)))
    stored, evaluated = read_state(tmp_path / "run")["rows"][1], [play(env, 1, i) for i in range(6)]
    assert stored.flatten().tolist() == pytest.approx([float(step[1][0]) for step in env.steps[:40]])
    assert any(length % 3 for length in lengths) and any(length % 3 for length in evaluated)
    rows = {key: float(value) for step, key, value in read_metrics(tmp_path / "run") if step == 0}
    assert rows["eval/length"] == pytest.approx(np.mean(evaluated))
    with video(str(tmp_path / "run" / "videos" / "step0-episode-0.mp4")) as clip:  # every step, and the reset
        assert clip.n_frames == evaluated[0] + 1
