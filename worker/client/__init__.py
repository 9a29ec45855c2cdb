"""The caller's side: what the command line, replication and orchestrators written in Python use.

`caller.py` is the contract of one call, `amqp_caller.py` and `http_caller.py` its two implementations, `client.py` the
whole table of methods with types, and `push.py` and `pull.py` move the bytes of a version.
"""
