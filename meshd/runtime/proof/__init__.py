"""proof: what of an engine is true on this machine, layer by layer, with what was seen.

`evidence` holds the words, `judge` and `occasion` decide (pure), `binary`, `backend` and `running`
look, `prover` is the service that looks at the right times and publishes. May not come in: any room
but this one, and a verdict that no evidence carries.
"""
