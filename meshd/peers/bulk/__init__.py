"""Bulk streams: weights between nodes, carried by a process of their own.

May come in: both ends of one blocking stream, what the daemon and its carrier process tell each
other, the hand-over of connections. May not come in: what is in a stream. In the daemon's own loop
a transfer would hold up every other round trip (`docs/adr/0010-bulk-carriers.md`).
"""
