"""The Triton kernels, one file an op, and how they are launched; importing the package alone loads no Triton."""
