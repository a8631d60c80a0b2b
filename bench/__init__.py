"""Benchmarks: what meshd costs, beside the programs it stands next to.

`python -m bench.proxy` and `python -m bench.start`, from the repository's root; see README.md here.
Nothing of meshd imports this.
"""
