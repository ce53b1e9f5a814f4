"""Shipped weights: a folder a set, each with its model card."""
