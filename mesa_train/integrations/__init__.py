"""Integrations with training frameworks: one call turns mesa_train on in each.

Each integration imports its framework only when it is used.
"""
