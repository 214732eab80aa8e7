"""How much each input column of the linear weights of a model counts, by a text."""
