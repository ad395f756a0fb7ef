"""The adapters of a model: put in, planned, started, made active, merged, taken out."""
