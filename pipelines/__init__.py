"""The pipelines themselves."""
