from .api import masked_cross_attention

__all__ = ["masked_cross_attention"]
