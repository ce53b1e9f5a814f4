"""Distillation of MILO from a teacher, where its training data or autoencoder are not at hand."""
