"""Latent spaces: images to latents and back, in tiles, and folders of them."""
