"""Where the bytes of models lie: one contract (`blobstore`), a backend a module, wrappers with the same contract."""
