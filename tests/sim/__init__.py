"""Membership machines in virtual time: one seed, one run."""
