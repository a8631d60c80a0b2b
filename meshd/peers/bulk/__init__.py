"""Bulk streams: weights and an engine's talk between nodes, carried by processes of their own.

May come in: both ends of one stream, what the daemon and its processes tell each other, the
hand-over of connections, tunnels to RPC servers of other nodes. May not come in: what is in a
stream. In the daemon's own loop a transfer would hold up every other round trip
(`docs/adr/0010-bulk-carriers.md`).
"""
