"""What a node is, and what it can prove: keys, certificates, signatures, who was revoked."""
