"""Evaluation: perplexity of a model on a text and its distance from another model.

`options` says what to measure, `text` makes windows, `load` models, `run` drives them, `metrics`
is the mathematics, `result` the answer and `job` all of it from names of files.
"""
