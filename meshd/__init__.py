"""meshd: one private inference service out of your own machines."""

__version__ = "0.1.0.dev0"
