"""meshd on an emulated aarch64: `make arm64-test`."""
