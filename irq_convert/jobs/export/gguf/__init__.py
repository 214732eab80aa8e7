"""Export to one GGUF file for llama.cpp and everything built on it (docs/export-gguf.md)."""

from irq_convert.jobs.export.gguf.target import GgufTarget

TARGET = GgufTarget()
