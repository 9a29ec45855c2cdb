"""The catalog: the in-memory view of the registry, folded from the journal's records.

Pure and synchronous. `Catalog.apply` is the only way in, for replay and live writes alike, so the catalog is at any
moment a function of a prefix of the journal.
"""
