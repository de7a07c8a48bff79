"""The commands of `python -m flamingo_kernels`, each in the file of its name.

A command has `add_arguments(parser)` and `main(options)`, which returns the exit status.
"""
