"""election: which node hosts which model.

Will hold deployments, demand, fit, placement, claims, leases and the ledger. Everything here decides
from a view and a clock reading; nothing here opens a socket, a file or a process.
"""
