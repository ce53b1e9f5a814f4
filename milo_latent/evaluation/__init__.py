"""Evaluation: how well metrics agree with people."""
