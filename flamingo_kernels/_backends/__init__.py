"""What runs an operator: a build of the kernels for this machine, or Triton; and how it is chosen.

env       every environment variable of the library
dispatch  which backend runs a call
library   how operators are registered with torch
cpu       loads the C++ kernels
cuda      loads the CUDA kernels
missing   why a compiled library is not there, and what builds it
triton    what the Triton kernels share
"""
