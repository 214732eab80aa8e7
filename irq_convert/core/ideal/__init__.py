"""The exact optimum over real numbers: a continuous sweep, and the brute force that checks it.

No command gets here. What `quantize_tensor` stores is chosen among pairs that 8 bits can hold;
tests and tests/bench/ judge that choice against `search.icq_search`, the compiled sweep
(`sweep.py`), and that against the oracles in plain torch (`oracle.py`).
"""
