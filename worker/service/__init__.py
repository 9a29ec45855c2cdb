"""The use cases: one coroutine for each RPC method, and what HTTP streams need besides.

`storing` brings versions in, `reading` answers lookups, `editing` changes what is stored, `checking` holds the bodies
of the long jobs. `service` puts them together; it knows no transport, and a transport knows no storage.
"""
