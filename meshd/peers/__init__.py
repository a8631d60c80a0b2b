"""peers: who the other nodes are.

Will hold identity and trust, discovery (mDNS, static, last known), membership (SWIM), links (mTLS)
and adverts. May come in: bytes from other nodes, addresses. May not come in: what a node should
host (election), what is on disk (cache), how a request travels (api).
"""
