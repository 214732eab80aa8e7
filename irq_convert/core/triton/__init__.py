"""The search and both directions of the format as Triton kernels, for NVIDIA GPUs.

`support` says where they run and imports nothing heavy; `quantize` and `dequantize` are the two
entries, which `irq_convert.core.quantize` and `irq_convert.core.dequantize` import only when a
tensor asks for them: Triton is not installed everywhere.
"""
