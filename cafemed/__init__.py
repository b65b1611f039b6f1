"""The shared library: cohorts, artifacts, batches, metrics, training, tuning and the registry."""
