"""Runs a script with `--precision bfloat16` on a CPU without instructions for it, where bfloat16 products are slow.

    python benchmark/emulate_bfloat16.py --script expo_diffusion --task pointmaze-medium --seed 1

A bfloat16 product on hardware rounds both factors to bfloat16, adds up in float32 and rounds the result. So does this,
with float32 instructions; everything else of the autocast region is torch's own. The learning curves are those of
bfloat16 hardware but for the order of the additions; the seconds are not. All flags but --script go to the script.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, not as a module

from benchmark.wrapper import wrapped_script
from utils import cli


class RoundedProducts(TorchFunctionMode):
    """While active, a Linear under a CPU autocast to bfloat16 is a float32 product of rounded factors, rounded."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and torch.is_autocast_enabled("cpu"):
            return rounded_linear(*args)
        return func(*args, **(kwargs or {}))


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (J, I), bias (J,) -> (..., J) in bfloat16, as autocast's own Linear gives."""
    with torch.autocast("cpu", enabled=False):
        rounded = [None if part is None else part.bfloat16().float() for part in (x, weight, bias)]
        return F.linear(*rounded).bfloat16()  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Parses --script and hands the rest on."""
    script, rest = wrapped_script(("expo_diffusion", "expo_flow", "expo_finetune"))
    with RoundedProducts():
        cli.run(script.main, script.Args, script.__doc__, [*rest, "--precision", "bfloat16"])


if __name__ == "__main__":
    main()
