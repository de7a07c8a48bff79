"""The layers of `flamingo`, computed by this library's operators: the same parameters, another forward.

Each class subclasses the module of the same name in `flamingo.modules`, so constructor arguments, parameter
names and `state_dict` are its own by construction. `patch` gives these classes to the modules of a model that
exists already.
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
