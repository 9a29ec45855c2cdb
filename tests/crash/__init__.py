"""The crash lab: every way in which a journal's bytes, its disk or its process can fail, in a bounded and a full form.

`python -m tests.crash` runs the whole matrix and counts; the tests in `tests/faults/test_journal_*.py` run bounded
forms of the same code. `python -m tests.crash.mutations` takes away each sync, rename and comparison in turn, and
looks whether a test notices.
"""
