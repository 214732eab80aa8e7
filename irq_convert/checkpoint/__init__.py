"""Any Hugging Face checkpoint as a stream: locate, open, read in tiles, write shards atomically.

This package knows files, tensors and bytes, and nothing of what is done with them.
"""
