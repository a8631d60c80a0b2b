"""cache: weights on this machine.

Reads references, checks GGUF files and makes the built-in model; downloads, repair and budgets come
later. May come in: paths, references. May not come in: what is done with the weights (runtime), who
else has them (peers). Nothing that fails a check here reaches an engine.
"""
