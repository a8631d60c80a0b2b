"""election: which node hosts which model.

Will hold deployments, demand, fit, placement, claims, leases and the ledger. All of it decides from
a view and a clock reading; nothing here opens a socket, a file or a process.
"""
