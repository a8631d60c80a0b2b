"""runtime: engines on this machine.

Builds or adopts llama.cpp, looks at what it really is, launches `llama-server`, supervises it, and
decides which models run here (`hosting`). May come in: references that other rooms resolve,
callables that say whether requests are in flight. May not come in: how weights are checked (cache),
how a request travels (api), which node should host what (election).

Nothing is re-exported: some modules here are used by short-lived commands, and importing the
supervisor for `meshd runtime ls` would be waste.
"""
