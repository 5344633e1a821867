"""Tell ten kinds of clothes apart."""

from torch import nn

from jobs.fashion_mnist.model import Cnn
from jobs.vision.classify import Classifier
from raymill.task import Schema


class Clothes(Classifier):
    """A small network from scratch."""

    def __init__(self, schema: Schema, width: int = 16) -> None:
        """`width`: channels of the first block."""
        super().__init__(schema)
        self.width = width

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Cnn(self.width, self.num_classes)
