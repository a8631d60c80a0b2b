"""peers: who the other nodes are, and how this one talks to them.

From the ground up, each package knowing only those before it:

- `swim`: who is alive, decided by pure machines;
- `trust`: keys, certificates, signatures, the deny list;
- `links`: the one port, TLS, frames, links and streams;
- `joining`: invites, admission, renewal;
- `lan`: addresses of this machine and members on the LAN.

Above them stand adverts, one membership in action (`session`), the node's place in a mesh (`mesh`),
and the diagnosis of the way to a peer. May come in: bytes from other nodes, addresses. May not come
in: what a node should host (election), what is on disk (cache), how a request travels (api).
"""
