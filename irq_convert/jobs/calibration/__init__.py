"""A model layer by layer over a text: what `quantize --calibrate` and `measure` share."""
