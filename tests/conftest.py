"""Fixtures every test may use. Leaked tasks, threads, children and sockets fail the test."""
