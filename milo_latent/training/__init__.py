"""Training: of the autoencoder, the cleaner, the restorer and the metric; never imported by inference."""
