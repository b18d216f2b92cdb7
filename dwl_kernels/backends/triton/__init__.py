"""The Triton kernels: the host side here, the device side in `kernels`.

`solve` takes a problem, `specialize` makes the arguments and the constants that a kernel is
compiled for, `tiles` chooses sizes, `launch` launches; `wide` is the form for more than 256
elements.
"""
