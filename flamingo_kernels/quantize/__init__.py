from .api import quantize, unquantize
from .report import QuantizeReport

__all__ = ["QuantizeReport", "quantize", "unquantize"]
