"""Guidance: from MILO's mask to the guided clean estimate inside each denoising step."""
