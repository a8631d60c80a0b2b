"""How a node is let in and stays: invites, admission, renewal."""
