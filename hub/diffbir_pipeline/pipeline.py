"""Custom pipeline of diffusers; it needs `pip install milo_latent`."""

from milo_latent.pipelines.diffbir import DiffBIRPipeline  # noqa: F401 (diffusers looks for it here)
