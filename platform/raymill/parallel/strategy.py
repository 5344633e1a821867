"""How a model is spread over the ranks: all that differs between one way and another, as one value.

`gradients.strategy_of` has those that there are. Loop, state and objectives ask the value and nothing else, so a way that cuts
parameters in pieces is one more value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Norm = Callable[[Sequence[nn.Parameter]], torch.Tensor]
"""The 2-norm of parameters' gradients, [], the same on all ranks."""


@dataclass(frozen=True)
class Strategy:
    """One way to spread a model; every function is called on all ranks in the same order.

    Attributes:
        wrap: a module whose forward pass is a loss -> the module that is called in its place in a training step.
        accumulating: that module -> within this, backward passes exchange no gradients: there is another to come in the step.
        gradients: leaves the gradient of the mean loss over a global batch on the parameters; see `gradients.averaged_gradients`.
        norm: of gradients.
        whole: a tensor of the state, as this rank holds it -> all of it, as it is saved.
        part: all of such a tensor, and what this rank holds of it -> what this rank is to hold.
        shards_apart: each shard of a batch begins with the buffers as the step found them, not as the shard before left them.
        warm_up: backward passes over no rows before the first step, after which sums are always rounded alike.
    """

    wrap: Callable[[nn.Module], nn.Module]
    accumulating: Callable[[nn.Module], AbstractContextManager[None]]
    gradients: Callable[..., Any]
    norm: Norm
    whole: Callable[[torch.Tensor], torch.Tensor]
    part: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    shards_apart: bool
    warm_up: int
