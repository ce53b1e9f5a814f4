"""The app as a Space of Hugging Face."""

from contextlib import suppress

with suppress(ImportError):
    import spaces  # noqa: F401 (before torch: it provides the GPU of ZeroGPU Spaces)

from milo_latent import load_restorer
from milo_latent.app.page import serve
from milo_latent.app.restoring import PhotoRestorer

serve(PhotoRestorer(load_restorer("nano"), model="nano"), host=None, max_megabytes=20)  # the Space names the host
