"""Random weights: as built, gates are zero and norms the identity, and a test proves nothing."""

import torch
from torch import nn


def randomise(module: nn.Module, std: float = 0.4) -> nn.Module:
    """Draws every parameter anew, gates and norms included, and returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def shake(module: nn.Module, std: float = 0.2) -> nn.Module:
    """Adds noise to every parameter, so that norms stay about 1, and returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn_like(parameter)
    return module


def gradcheck(module: nn.Module, *inputs, **kwargs) -> bool:
    """Numerical against analytical gradients of a float64 module, in its parameters and its tensor inputs."""
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def call(*tensors):
        arguments, weights = tensors[: len(inputs)], tensors[len(inputs) :]
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, state, arguments, kwargs)

    return torch.autograd.gradcheck(call, (*inputs, *parameters))
