"""Tell clothes apart with a network that torchvision has."""

from torch import nn

from jobs.resnet import model
from jobs.vision.classify import Classifier
from raymill.task import Schema


class Named(Classifier):
    """A network by its name."""

    def __init__(self, schema: Schema, name: str = "resnet18", weights: str | None = None) -> None:
        """`name`: of torchvision; `weights`: DEFAULT, the path of a .safetensors file, or null."""
        super().__init__(schema)
        model.check(name, weights)
        self.name, self.weights = name, weights

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return model.build(self.name, self.weights, self.num_classes)
