"""Runs a script on a GPU with its whole update as one CUDA graph: the same method, far less waiting for Python.

    python tools/cuda_graph.py --script expo_flow --task antmaze-umaze --seed 1

An update is thousands of small kernels. Without a graph Python starts them one by one, and the GPU waits. EXPO's choice
of an action is a second graph. The numbers stay the same up to rounding. All flags but --script go to the script.
docs/performance.md has the times.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts when this file is run

from tools.changed import run_changed
from utils import InputError


class Recorded:
    """A function of tensors as a CUDA graph. Inputs of another shape get a graph of their own."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, Counter()
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Any]] = {}  # with inputs, outputs

    @torch.compiler.disable
    def __call__(self, *inputs: Tensor) -> Any:
        """The outputs are overwritten by the next call."""
        shape = inputs[0].shape
        self.calls[shape] += 1
        # The first calls allocate what the graph needs, on a stream of their own, as torch asks for.
        if self.calls[shape] <= 3:
            if not inputs[0].is_cuda:
                raise InputError("tools/cuda_graph.py needs a GPU; run the script itself")
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                outputs = self.function(*inputs)
            main.wait_stream(side)
            return outputs
        if shape not in self.graphs:  # no kernel runs yet
            graph, held = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in inputs)
            with torch.cuda.graph(graph):
                self.graphs[shape] = graph, held, self.function(*held)
        graph, held, outputs = self.graphs[shape]
        for old, new in zip(held, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs


def cuda_graph(script: Any) -> None:
    """Replaces the script's `update`, and an agent's `on_the_fly_actions`."""
    if not torch.cuda.is_available():
        raise InputError("tools/cuda_graph.py needs a GPU; run the script itself")
    update, recorded = script.update, {}

    def replayed(agent: Any, optimizers: Any, batch: Any) -> dict[str, Tensor]:
        parts = vars(optimizers).values()
        if id(optimizers) not in recorded:
            recorded[id(optimizers)] = Recorded(lambda *fields: update(agent, optimizers, type(batch)(*fields)))
            for group in (group for part in parts for group in getattr(part, "param_groups", ())):
                lr = torch.as_tensor(group["lr"], device=batch.obs.device)  # where a replay sees how it decays
                group |= {"capturable": True, "lr": lr}
        steps = recorded[id(optimizers)]
        replays = batch.obs.shape in steps.graphs
        info = steps(*batch)
        for decay in (part for part in parts if replays and isinstance(part, LambdaLR) and part.last_epoch):
            decay.step()  # it is Python, and no part of the graph; without edits, theirs stays at 0
        return info

    class Agent(script.Agent):
        def on_the_fly_actions(self, obs: Tensor, *options: Any) -> Tensor:
            key = id(self), *options
            if key not in recorded:
                act = super().on_the_fly_actions
                recorded[key] = Recorded(lambda obs: act(obs, *options))
            return recorded[key](obs)

    script.update = replayed
    if hasattr(script.Agent, "on_the_fly_actions"):
        script.Agent = Agent


if __name__ == "__main__":
    run_changed({cuda_graph: ()})
