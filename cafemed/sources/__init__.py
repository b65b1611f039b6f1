"""Adapters from tables on disk to `Records`; one module a source."""
