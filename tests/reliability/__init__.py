"""Programs that are killed, and whether the next run is right.

``make kills``, or in the folder ``tests``: ``python -m reliability --help``.
"""
