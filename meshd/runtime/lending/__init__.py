"""lending: this node's devices in the service of another node's engine.

`rpc_server` runs one ggml-rpc-server for one loan and proves that the port is its own; `warming`
fills its cache of tensors from weights that were verified here, so that the host need not push
them; `tensor_cache` keeps what lies on the disk whole and bounded; `rpc_client` asks an RPC server
what it speaks, near or through a tunnel. May not come in: who may borrow and for how long (peers),
how much memory there is to lend (election), how the host's bytes get here (peers).
"""
