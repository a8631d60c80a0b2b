"""Whether a model fits on a node: memory counted from its shape, budgets of devices, and what
engines reported afterwards. Pure; nothing that decides who hosts comes in here."""

from meshd.election.fit.budget import HOST, Budget, budgets
from meshd.election.fit.correction import Correction, Corrections, observed
from meshd.election.fit.estimate import Estimate, LayerNeed, estimate
from meshd.election.fit.placing import Fit, fit
from meshd.election.fit.rows import WorkerMemory
from meshd.election.fit.splitting import SplitFit, split_fit

__all__ = [
    "HOST",
    "Budget",
    "Correction",
    "Corrections",
    "Estimate",
    "Fit",
    "LayerNeed",
    "SplitFit",
    "WorkerMemory",
    "budgets",
    "estimate",
    "fit",
    "observed",
    "split_fit",
]
