"""Membership by SWIM: one pure machine, made of small ones."""
