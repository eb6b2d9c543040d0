"""The worker's side of leases: who is compressed, what is captured, when it is compressed.

``runtime.py`` composes the parts: the request table, the query windows, a step's metadata, and
the compressions that are due.
"""
