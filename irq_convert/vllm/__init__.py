"""A plugin of vLLM: it serves artifacts as they are.

Importing this room imports no vLLM; `register.py` is what vLLM calls, and the files that say so at
their top are imported by it alone.
"""
