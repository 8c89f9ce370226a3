"""How fast generation is, on a random model, against slower ways to the same tokens.

``make benchmarks``, or in the folder ``tests``: ``python -m benchmarks --help``. pytest does not collect it.
"""
