"""DiffBIR's parts: cleaners, IRControlNet, color fixes."""
