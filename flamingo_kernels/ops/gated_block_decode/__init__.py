from .api import GatedBlockWeights, gated_block_decode

__all__ = ["GatedBlockWeights", "gated_block_decode"]
