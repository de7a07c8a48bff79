"""The layers of `flamingo`, computed by this library's operators: the same parameters, another forward.

Each class subclasses the module of the same name in `flamingo.modules`, so constructor arguments, parameter
names and `state_dict` are the same by construction. `patch` gives these classes to the modules of an existing
model.

cross_attention  gated blocks and their attention
resampler        the Perceiver Resampler
decode           one token through a block by one operator
fused            the base class of all fused layers
protocols        what the functions here need of a module
"""

from .cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from .fused import Fused
from .resampler import PerceiverAttention, PerceiverResampler

__all__ = [
    "Fused",
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "PerceiverAttention",
    "PerceiverResampler",
]
