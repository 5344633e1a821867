"""Is there a tree on it?"""

from torch import nn

from jobs.transfer.model import Headed
from jobs.vision.classify import Classifier
from raymill.task import Schema


class Trees(Classifier):
    """First the head alone; then, from the step that the job file says, the trunk as well, at a lower rate."""

    def __init__(self, schema: Schema, pretrained: bool = True) -> None:
        """`pretrained`: begin with weights that were trained on ImageNet."""
        super().__init__(schema)
        self.pretrained = pretrained

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Headed(self.num_classes, pretrained=self.pretrained)
