"""Training from a YAML file: run config, data, tasks, metrics, ``Trainer``, resuming."""
