"""An average of the weights over steps, kept beside those that are trained. It is what is evaluated, saved and registered.

Parameters alone are averaged; buffers are those of the model. Until the average begins, it is the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from raymill.config.spec import AverageSpec


class WeightAverage:
    """The average of a model's parameters, the same on all ranks.

    Attributes:
        num_averaged: states of the weights in it so far.
    """

    def __init__(self, spec: AverageSpec, model: nn.Module) -> None:
        """Begin with the model's parameters."""
        self._spec = spec
        make_update: Any = partial(get_ema_multi_avg_fn, spec.decay) if spec.kind == "ema" else get_swa_multi_avg_fn
        self._update = make_update()
        self._parameters = dict(model.named_parameters())
        # A parameter that two modules share has two names in a state_dict.
        self._names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.num_averaged = 0

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights as they are behind this step."""
        if step >= self._spec.from_step and self.num_averaged:
            count = torch.tensor(self.num_averaged, device=next(iter(self._averages.values())).device)
            self._update(list(self._averages.values()), [p.detach() for p in self._parameters.values()], count)
        else:
            self._copy(self._parameters, self._averages)
        self.num_averaged += step >= self._spec.from_step

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average into the model and the weights that are trained in its place, or back."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self._averages, self._parameters)
        self._copy(trained, self._averages)

    def averages(self) -> Mapping[str, torch.Tensor]:
        """Parameter name -> average."""
        by_parameter = {id(parameter): self._averages[name] for name, parameter in self._parameters.items()}
        return {name: by_parameter[number] for name, number in self._names.items()}

    @torch.no_grad()
    def restore(self, trained: Mapping[str, torch.Tensor], num_averaged: int) -> None:
        """Take the model's parameters, as they were saved, for the average, and these for those that are trained."""
        self._copy(self._parameters, self._averages)
        self._copy(trained, self._parameters)
        self.num_averaged = num_averaged

    @staticmethod
    def _copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])
