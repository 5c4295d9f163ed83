"""The recurrence of a layer as one Triton kernel: the kernel, its plans, its launch.

Import this package only where Triton is to be used: the rest of tritonrnn works without it.
"""
