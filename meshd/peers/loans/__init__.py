"""Memory of worker nodes for a model that one host cannot hold: asked for, granted, kept, ended.

Each loan is one raw stream, from the host's ask to the end of either side; whoever hears nothing on
it takes it for ended. What memory is and how an engine uses it is known to others.
"""
