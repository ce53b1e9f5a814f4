"""Evaluation: how well metrics agree with people, and how well restorers restore."""
