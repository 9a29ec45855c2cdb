"""What the bytes of a model are, told without ever loading them.

`registry` is the way in: `examine` runs the checks, `refusal` turns their findings into the error of a store. A format
gets a check of its own by a line in `registry.HOOKS`; `source` says how such a hook reads a file.
"""
