"""The crash lab. A disk that forgets, and every state that a crash may leave of what is played on it; real processes
that are killed, whose power is cut, and whose system calls fail; files that are damaged.

`python -m tests.crash` does all of it and counts. `tests/faults/test_journal_crashes.py` and `test_journal_lab.py` do a
bounded part.
"""
