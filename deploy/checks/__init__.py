"""Checks of what lies in `deploy/`, with the tools of each field; `make lint-deploy` runs them."""
