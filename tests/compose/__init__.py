"""deploy/compose.yaml on a Docker daemon, as an operator meets it; `python -m tests.compose` runs it."""
