"""Handwritten digits, with layers of our own."""

from torch import nn

from jobs.custom_layers.model import Network
from jobs.vision.classify import Classifier
from raymill.task import Schema


class Digits(Classifier):
    """A network all of whose layers but the convolutions are in `model.py`."""

    def __init__(self, schema: Schema, width: int = 24) -> None:
        """`width`: channels of the first convolution."""
        super().__init__(schema)
        self.width = width

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Network(self.width, self.num_classes)
