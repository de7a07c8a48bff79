"""The sides of a profile: the model as it is, and what is held against it."""

BEFORE, PATCHED, LINEARS, INT8 = "before", "patch", "linears", "int8"
COMPILED, FROZEN, FOLDED = "compile", "freezing", "fold"
