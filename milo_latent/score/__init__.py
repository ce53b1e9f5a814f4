"""Scores of pairs, of folders, and their tables."""
