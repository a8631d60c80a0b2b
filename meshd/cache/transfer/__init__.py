"""transfer: weights on their way, from the hub and from other nodes, in a process of its own.

The daemon starts one child a fetch (`meshd.fetcher`), gives it an order and reads what it says;
killing it at any moment leaves a state the next one goes on from.
"""
