"""From a file of rows to a trained adapter: run config, data, tasks, metrics, Trainer, resume."""
