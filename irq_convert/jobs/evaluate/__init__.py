"""Evaluation: perplexity of a model on a text and its distance from another model.

`options` says what to measure, `windows` drives one model or two, `report` is what came out,
`adapter` puts an adapter on and `evaluate` is all of it from names of files. Text, metrics and
loading lie below: `jobs/common` and `hf/causal_lm`.
"""
