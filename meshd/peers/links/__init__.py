"""Connections between nodes: one port, TLS, frames, one link a pair, one connection a stream."""
