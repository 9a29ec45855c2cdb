"""The crash lab: a disk that forgets, what is played on it, and every state that a crash may leave of it.

`python -m tests.crash` looks at all of it and counts; `tests/faults/test_journal_crashes.py` at a bounded part.
"""
