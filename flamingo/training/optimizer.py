"""AdamW as in the paper, on float32 weights whatever the model computes in."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from flamingo.training.config import TrainingConfig


class TrainedWeights:
    """The parameters that take a gradient, as the optimizer sees them.

    ::

        bfloat16      weights, float32  -- publish -->  parameters, bfloat16
                                        <-- add up --   their gradients, bfloat16
        otherwise     the parameters themselves

    With `bfloat16` all parameters of the model become bfloat16, and frozen ones are kept in nothing wider.

    Args:
        model: whose parameters these are.
        bfloat16: see above. Not for a model that FSDP2 has sharded: its policy does the same.

    Attributes:
        by_name: the weights, with `grad` once a backward pass has run.
    """

    def __init__(self, model: nn.Module, *, bfloat16: bool):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                "train: expected parameters that take a gradient, got a model that is all frozen."
            )
        self.by_name: dict[str, nn.Parameter] = trained
        self._copies: dict[str, nn.Parameter] = {}
        self._hooks = []
        if bfloat16:
            self.by_name = {name: nn.Parameter(p.detach().float().clone()) for name, p in trained.items()}
            self._copies = trained
            store_as(torch.bfloat16, model.parameters())
            for name, parameter in trained.items():
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._adds_up(name)))

    def _adds_up(self, name: str):
        weight = self.by_name[name]

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
            parameter.grad = None

        return add

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model the weights as they are now."""
        for name, parameter in self._copies.items():
            parameter.copy_(self.by_name[name])

    def release(self) -> None:
        """Leaves the model's parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def store_as(dtype: torch.dtype, parameters: Iterable[Tensor]) -> None:
    """Converts parameters in place; buffers, as the frequencies of positions, stay exact."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def make_optimizer(weights: Mapping[str, nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over two groups: weights that decay, and those whose names begin with one of `no_decay`."""
    still = [p for name, p in weights.items() if name.startswith(config.no_decay)]
    decayed = [p for name, p in weights.items() if not name.startswith(config.no_decay)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": still, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(beta1, beta2),
        eps=config.eps,
    )


def learning_rate(update: int, config: TrainingConfig) -> float:
    """The rate of an update, counted from 1: a straight line from 0, then constant.

    >>> from flamingo.training import Pairs
    >>> config = TrainingConfig(folder="run", datasets=(Pairs(name="ltip", shards=("ltip/*.tar",)),))
    >>> [f"{learning_rate(update, config):.1e}" for update in (1, 2500, 5000, 500_000)]
    ['2.0e-08', '5.0e-05', '1.0e-04', '1.0e-04']
    """
    return config.learning_rate * min(1.0, update / max(1, config.warmup_steps))
