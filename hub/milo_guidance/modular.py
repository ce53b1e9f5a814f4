"""Custom block of diffusers; it needs `pip install milo_latent`."""

from milo_latent.guidance.modular import MILOGuidanceStep  # noqa: F401 (diffusers looks for it here)
