"""The same search in plain torch: for devices without kernels, and as an oracle of the kernels.

It mirrors `core.kernels` formula by formula, so it gives the same bytes, and is written to be read.
"""
