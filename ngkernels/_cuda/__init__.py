"""The ops in CUDA C++ (csrc/cuda): tensor-core products, whose results stay in the registers of a warp from one stage to the next.

    lower.py       a program as stages, and where the kernels want its parameters
    plan.py        the blocks of a graph as panels, one for each warp, and the order in which partial results are summed
    launch.py      kernels by number; a device, or the emulated one of the tests
    call.py        a call's tensors, tables and working memory
    aggregate.py, attend.py   the ops
    backward.py    the backward pass of all
"""
