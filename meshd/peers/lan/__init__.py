"""What the local network says: addresses of this machine, members that announce themselves."""
