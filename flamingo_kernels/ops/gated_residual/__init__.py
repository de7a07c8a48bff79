from .api import gated_residual

__all__ = ["gated_residual"]
