"""A model of one streaming multiprocessor, which predicts the time of kernels that no GPU is there to run.

    machine_code.py     reads what the compiler made: instructions, and how the hardware is to schedule them
    path.py             which of them a warp executes, given how often loops run
    multiprocessor.py   issues them: schedulers, units, L2 and memory as queues; what it assumes stands there
    work.py             the kernels and shapes that are predicted

`python -m benchmarks.sm_model` prints the table. It serves to choose between two versions of a kernel, by the
ratio of their times; where a GPU is, `make gpu` measures. `predicted.json` holds the last table: a slow test
fails where a time has grown by more than a tenth.
"""
