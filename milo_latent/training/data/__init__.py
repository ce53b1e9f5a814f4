"""The data of training: crops, degradations, pairs, shards and their fingerprints."""
