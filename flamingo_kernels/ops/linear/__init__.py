from .api import linear

__all__ = ["linear"]
