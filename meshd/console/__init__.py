"""console: what people look at. Today one self-contained page; later `meshd top` as well.

It reads `/mesh/status` and `/mesh/events` like any other client and decides nothing.
"""
