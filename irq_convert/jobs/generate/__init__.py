"""Generating text: what a model, with its adapter, makes of a prompt, piece by piece as it comes.

`options` says how tokens are chosen, `prompt` makes tokens of a text or a conversation, `models`
loads what writes, `stream` lets one model write, `generate` is all of it, two models in turns.
"""
