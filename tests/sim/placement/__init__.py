"""Elections in virtual time: many nodes that host models, under faults; one seed, one run."""
