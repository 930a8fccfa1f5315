"""Makes docs/images/arm.gif: a demonstration, imitation alone and EXPO, side by side from the same starts.

    python docs/make_arm.py           # trains into runs/pictures/ in some minutes; needs OpenGL (EGL without a display)

The starts are the seeds 1000, 1001, ...; none is left out. A green frame is a success, a red one a time limit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from make_pictures import IMAGES, trained_agent
from PIL import Image, ImageDraw, ImageFont

from demonstrations.fetch import Controller
from utils.envs import make_env
from utils.tasks import TASKS

TASK, STARTS, STEPS = "fetch-pick-and-place", range(1000, 1005), 1_000
FLAGS = f"--task {TASK} --dataset generated:{TASK}:200 --offline-steps 6000 --total-timesteps"  # as in arm_200.toml
BOX, SIZE = (110, 90, 390, 410), (180, 206)  # what is kept of a picture of 480 x 480, and how large it becomes
GREEN, RED = (0, 158, 115), (213, 94, 0)


def episode(env: Any, seed: int, act: Callable[[np.ndarray], np.ndarray]) -> tuple[list[Image.Image], bool]:
    """One picture for every action, and whether the block reached the goal."""
    obs, done, pictures, success = env.reset(seed=seed)[0], False, [], False
    while not done:
        pictures.append(Image.fromarray(env.render()).crop(BOX).resize(SIZE))
        obs, _, success, truncated, _ = env.step(act(obs))
        done = success or truncated
    return [*pictures, Image.fromarray(env.render()).crop(BOX).resize(SIZE)], success


def policy(sample: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda obs: sample(torch.as_tensor(obs).unsqueeze(0)).squeeze(0).numpy()


@torch.no_grad()
def main() -> None:
    settings = TASKS[TASK].settings
    env = make_env(TASKS[TASK].env_id, TASK, settings["max_episode_steps"], settings["action_repeat"], (), "rgb_array")
    imitation = trained_agent("expo_flow", "arm imitation", [*FLAGS.split(), "0"]).target_base_policy.sample
    expo = trained_agent("expo_flow", "arm", [*FLAGS.split(), str(STEPS)])
    titles = "demonstration", "imitation alone", f"EXPO, {STEPS:,} steps"
    frames, counts, font = [], np.zeros(3, int), ImageFont.load_default(14)
    for number, seed in enumerate(STARTS, 1):
        torch.manual_seed(seed)
        controller = Controller(env, env.reset(seed=seed)[0], np.random.default_rng(seed))
        acts = lambda obs, c=controller: np.clip(c.act(obs), -1, 1).astype(np.float32), policy(imitation), policy(expo)
        panels = [episode(env, seed, act) for act in acts]
        counts += [success for _, success in panels]
        length = max(len(pictures) for pictures, _ in panels)
        for t in range(length + 6):  # the last picture stays for a moment
            frame = Image.new("RGB", (3 * SIZE[0], SIZE[1] + 22), "white")
            draw = ImageDraw.Draw(frame)
            for i, (pictures, success) in enumerate(panels):
                frame.paste(pictures[min(t, len(pictures) - 1)], (i * SIZE[0], 22))
                draw.text(
                    (i * SIZE[0] + 6, 3),
                    f"{titles[i]}: {counts[i] - (success if t < len(pictures) - 1 else 0)} of {number}",
                    "black",
                    font,
                )
                if t >= len(pictures) - 1:
                    x = i * SIZE[0]
                    draw.rectangle((x, 22, x + SIZE[0] - 1, SIZE[1] + 21), outline=GREEN if success else RED, width=5)
            frames.append(frame.quantize(48, dither=Image.Dither.NONE))
    frames[0].save(IMAGES / "arm.gif", save_all=True, append_images=frames[1:], duration=80, loop=0, optimize=True)
    print(f"{IMAGES / 'arm.gif'}: {(IMAGES / 'arm.gif').stat().st_size / 1e6:.2f} MB, successes {counts.tolist()}")


if __name__ == "__main__":
    main()
