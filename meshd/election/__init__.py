"""election: which node hosts which model.

Deployments, demand, fit, offers, ranking, claims and the ledger of leases. All of it decides from a
view and a clock reading; nothing here opens a socket or starts a process, and only `store.py` uses
the disk, for what must outlive a run.
"""
