"""The native rows: a C++ extension for the common calls of the operators."""
