from .api import perceiver_attention

__all__ = ["perceiver_attention"]
