"""meshd under a real systemd: `make service-test`."""
