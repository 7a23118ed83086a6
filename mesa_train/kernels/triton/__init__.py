"""The Triton kernels, and their registration on first use."""
