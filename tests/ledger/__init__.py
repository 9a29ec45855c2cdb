"""A rack under load and under every fault there is, and the ledger that its callers keep.

`python -m tests.ledger` runs it in full; `tests/faults/test_ledger.py` runs a bounded form of it.
"""
