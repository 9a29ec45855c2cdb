"""Checks of what lies in `deploy/`, with the tools that people of that field check with; `make lint-deploy` runs them."""
