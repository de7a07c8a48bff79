from .api import gated_residual_norm

__all__ = ["gated_residual_norm"]
