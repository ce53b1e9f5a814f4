"""Restoration: one call, files and folders, faces."""
