"""The operators: one file each.

A file opens with the saved operands, the rebuilt tensors and the cost.
"""
