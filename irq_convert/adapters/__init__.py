"""IEC-LoRA on PEFT: trainable adapters of quantized layers, and reading their files without PEFT.

Importing this package is cheap; `irq_convert.adapters.peft_type` teaches PEFT the type "IEC_LORA".
"""
