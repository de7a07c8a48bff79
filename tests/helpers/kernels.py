"""Whether a model computes with the kernels."""

from torch import nn

from flamingo import Flamingo
from flamingo_kernels import layers
from flamingo_kernels.patch import linears


def has_kernels(model: Flamingo) -> bool:
    """Whether its modules and all its linear layers are swapped; some without the others is an error."""
    parts = [isinstance(model.resampler, layers.PerceiverResampler)]
    parts += [isinstance(block, layers.GatedCrossAttentionBlock) for block in model.cross_attn.values()]
    parts += [type(part) is linears.Linear for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(parts) > 10
    assert len(set(parts)) == 1, parts
    return parts[0]
