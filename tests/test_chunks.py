"""Action chunks: with H = 1 the parent's run; windows by hand; masks; acting, evaluation and video, open loop."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_agent, make_batch
from running import assert_same, read_metrics, read_state, run_here, small_args, values_of
from test_run import Walk, walks  # noqa: F401

import expo_flow
from demonstrations import demonstrations
from utils.data import to_dataset
from variants import expo_chunks as script


@pytest.mark.parametrize("flags", [{"gamma": 0.97}, {"backup": "entropy", "num_edit_samples": 0}, {"gamma": 0.0}])
def test_a_chunk_of_one_step_gives_the_parents_run(flags, tmp_path):
    for name, module in (("parent", expo_flow), ("one", script)):
        run_here(module, small_args(module, tmp_path / name, chunk_length=1, **flags))
    assert read_metrics(tmp_path / "parent") == read_metrics(tmp_path / "one")
    assert_same(read_state(tmp_path / "parent"), read_state(tmp_path / "one"))  # also optimisers, rows, random state


# Steps: obs, reward, next_obs, termination; action (obs, -obs). Row 6 is cut off, and its reset returns its next_obs.
STEPS = [(1, 8, 2, 0), (2, 4, 3, 0), (3, 2, 4, 0), (4, 1, 5, 1), (5, 8, 6, 0), (6, 4, 7, 0), (8, 2, 8, 0)]  # offline
STEPS += [(8, 8, 9, 0), (9, 4, 10, 0), (0, 2, 0, 0)]  # online; the last next_obs is 0, as the empty rows behind it
# The window from each of them on, H = 3 and gamma = 1/2: length, discounted rewards, next_obs, termination.
WINDOWS = [(3, 8 + 2 + 0.5, 4, 0), (3, 4 + 1 + 0.25, 5, 1)]  # inside; up to the end of the task
WINDOWS += [(2, 2 + 0.5, 5, 1), (1, 1, 5, 1), (2, 8 + 2, 7, 0), (1, 4, 7, 0)]  # the end within; a time limit within
WINDOWS += [(3, 2 + 4 + 1, 10, 0), (2, 8 + 2, 10, 0), (1, 4, 10, 0), (1, 2, 0, 0)]  # that reset is not seen


@pytest.mark.parametrize("parts", [[7, 10], range(7, 11)], ids=["after a resume", "row by row"])
def test_windows_by_hand(parts, monkeypatch):
    o, r, n, d = np.array(STEPS, np.float32).T
    fields = o[:, None], np.stack([o, -o], 1), r, n[:, None], d
    buffer = script.ReplayBuffer(tuple(field[:7] for field in fields), 3, torch.device("cpu"), 3, 0.5)
    for i, j in itertools.pairwise(parts):
        buffer.add(*(field[i:j] if j > i + 1 else field[i] for field in fields))
    monkeypatch.setattr(torch, "randint", lambda *words, **_: torch.arange(words[-1][1])[None])
    batch = buffer.draw(1.0, 1, 10)  # every row once
    found = batch.lengths, batch.rewards, batch.next_obs[..., 0], batch.terminations
    assert torch.cat(found).T.tolist() == list(map(list, WINDOWS)) and batch.obs.flatten().tolist() == o.tolist()
    for i, (k, *_) in enumerate(WINDOWS):
        behind, actions = [0] * (6 - 2 * k), [sign * x for x in o[i : i + k] for sign in (1, -1)]
        assert (batch.actions[0, i].tolist(), batch.mask[0, i].tolist()) == (actions + behind, [1] * 2 * k + behind)


@pytest.mark.parametrize("without", ["", "next_observations"])  # then the last row of a time limit is dropped
def test_windows_of_a_file_end_where_its_episodes_end(without):
    data = to_dataset({k: v for k, v in demonstrations("pointmaze-umaze").items() if k != without})
    assert bool(data.dropped) == bool(without) and 0 < data.rows.terminations.sum() < len(data.episodes)
    follows = script.ReplayBuffer(data.rows, 0, torch.device("cpu"), 3).follows[: len(data.rows.obs)]
    assert np.flatnonzero(follows == 0).tolist() == data.episodes[:, 0].tolist()


def test_losses_leave_out_what_is_behind_the_end():  # k of 3 steps with 2 numbers each
    agent, lengths = make_agent(script, chunk_length=3, gamma=0.5, edit_scale=0.2), torch.randint(1, 4, (30,))
    mask, batch = (torch.arange(6) < 2 * lengths[:, None]).float(), make_batch(script, 30, action_dim=6)
    batch = batch._replace(mask=mask, lengths=lengths.float(), actions=mask * batch.actions)
    torch.manual_seed(5)
    loss, network = agent.base_policy.loss(batch.obs, batch.actions, mask), agent.base_policy.network
    torch.manual_seed(5)
    t, noise = torch.rand(30, 1), torch.randn(30, 6)
    velocity = network((1 - t) * noise + t * batch.actions, batch.obs, network.time_code(t))
    torch.testing.assert_close(loss, (mask * (velocity - (batch.actions - noise)) ** 2).sum() / 30)
    agent.edit_policy.forward = lambda *_, **__: (0.1 * torch.ones(30, 6), torch.zeros(30))
    agent.critic.forward, seen = lambda obs, actions: seen.append(actions) or actions.sum(-1)[None], []
    agent.target_critic.random_min = lambda obs, actions, num: torch.full(actions.shape[:-1], 16.0)
    agent.edit_policy_loss(batch)
    torch.testing.assert_close(seen[0], mask * (batch.actions + 0.1).clamp(max=1))
    y = agent.td_target(batch, torch.zeros(30, 4, 6))[0]
    torch.testing.assert_close(y - batch.rewards, (1 - batch.terminations) * 16 * 0.5**lengths)
    assert agent.target_entropy == pytest.approx(-3 * 2 / 2 + 6 * math.log(0.2))


def decide(obs: torch.Tensor) -> torch.Tensor:  # chunks of three steps, which tell the observation
    return 0.2 * obs[:, :1] + torch.tensor([0.0, 0.1, 0.35])


def play(env: Walk, kind: int, episode: int) -> int:
    """An episode of training (0) or evaluation (1), slowly. Returns its length."""
    obs, taken, ends, chunk = env.reset(seed=script.episode_seed(1, kind, episode))[0], 0, [False], []
    while not any(ends):
        chunk = chunk if taken % 3 else decide(torch.tensor(obs[None]))[0].tolist()
        obs, _, *ends, _ = env.step(np.array([chunk[taken % 3]], np.float32))
        taken += 1
    return taken


def test_a_run_acts_is_evaluated_and_is_filmed_open_loop(walks, monkeypatch, tmp_path):  # noqa: F811
    video: Any = pytest.importorskip("moviepy").VideoFileClip
    monkeypatch.setattr(script.Agent, "on_the_fly_actions", lambda agent, obs: decide(obs))
    flags: dict[str, Any] = {"total_timesteps": 40, "learning_starts": 0, "eval_episodes": 6, "chunk_length": 3}
    walks(script, tmp_path / "run", capture_video=True, **flags)
    env, stored = Walk(), read_state(tmp_path / "run")["rows"][1].flatten().tolist()
    lengths, evaluated = ([play(env, kind, i) for i in range(n)] for kind, n in ((0, 40), (1, 6)))
    assert stored == pytest.approx([float(step[1][0]) for step in env.steps[:40]])
    assert any(length % 3 for length in lengths[:8]) and any(length % 3 for length in evaluated)  # cut chunks
    assert values_of(read_metrics(tmp_path / "run"), "eval/length")[0] == pytest.approx(np.mean(evaluated))
    assert video(str(tmp_path / "run/videos/step0-episode-0.mp4")).n_frames == 1 + evaluated[0]  # reset, every step
