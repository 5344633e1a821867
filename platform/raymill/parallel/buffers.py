"""A model's buffers as they were, to undo what a forward pass did to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from raymill.parallel.process_group import broadcast_buffers


@dataclass(frozen=True)
class SavedBuffers:
    """Buffers of rank 0, as they were at some moment of a step.

    Attributes:
        pairs: each buffer with a copy.
    """

    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of_rank_zero(cls, model: nn.Module) -> SavedBuffers:
        """Give all ranks those of rank 0, and copy them."""
        broadcast_buffers(model)
        return cls.of(model)

    @classmethod
    def of(cls, model: nn.Module) -> SavedBuffers:
        """Copy this rank's."""
        return cls([(buffer, buffer.clone()) for buffer in model.buffers()])

    def restore(self) -> None:
        """Put them back; an observer may have given one another shape."""
        with torch.no_grad():
            for buffer, before in self.pairs:
                if buffer.shape != before.shape:
                    buffer.resize_(before.shape)
                buffer.copy_(before)
