"""The engine of training: one loop, its recipes, optimizers, logs and records."""
