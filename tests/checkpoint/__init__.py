"""Tests of `irq_convert.checkpoint`, with real files, processes and an HTTP server on loopback."""
