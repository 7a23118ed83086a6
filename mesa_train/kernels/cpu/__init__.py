"""The C++ kernels, and their build on first use."""
