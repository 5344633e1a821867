"""Networks of torchvision by name, with weights from where they can be had."""

from difflib import get_close_matches
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from torchvision import models

HEADS = ("fc", "classifier", "head", "heads")
"""What the last layers are called in torchvision's networks."""


def check(name: str, weights: str | None) -> None:
    """Raise ValueError unless torchvision has such a network, and the weights are "DEFAULT" or a file that is there."""
    known = models.list_models(models)
    if name not in known:
        near = get_close_matches(name, known, 3) or known[:3]
        raise ValueError(f"torchvision has no network {name!r} for pictures; it has {', '.join(near)} and others")
    if weights not in (None, "DEFAULT") and not (str(weights).endswith(".safetensors") and Path(str(weights)).is_file()):
        raise ValueError(f"weights: found {weights!r}; expected DEFAULT, null, or the path of a .safetensors file that is there")


def build(name: str, weights: str | None, num_classes: int) -> nn.Module:
    """A network with a head of so many classes.

    Args:
        name: of torchvision: resnet18, vgg11_bn, mobilenet_v3_small ...
        weights: "DEFAULT": as torchvision publishes them, fetched from its site; a .safetensors file; or None: random ones.

    Raises:
        OSError: they cannot be fetched.
    """
    if weights != "DEFAULT":
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        if weights is not None:
            own = model.state_dict()
            given = load_file(weights)
            # The head has another number of classes, mostly.
            model.load_state_dict(
                {**own, **{key: given[key] for key in own if key in given and given[key].shape == own[key].shape}}
            )
        return model
    try:
        model = models.get_model(name, weights="DEFAULT")
    except OSError as error:
        raise OSError(f"{name}: its weights could not be fetched: {error}. Give a file of them, or weights: null.") from error
    head = next(part for part in HEADS if hasattr(model, part))
    last, parent = _last_linear(getattr(model, head), head, model)
    setattr(parent, last, nn.Linear(parent.get_submodule(last).in_features, num_classes))  # type: ignore[arg-type]
    return model


def _last_linear(module: nn.Module, name: str, parent: nn.Module) -> tuple[str, nn.Module]:
    """Name and parent of the last linear layer."""
    if isinstance(module, nn.Linear):
        return name, parent
    return [(child, module) for child, part in module.named_children() if isinstance(part, nn.Linear)][-1]
