from .api import linear, multiply

__all__ = ["linear", "multiply"]
