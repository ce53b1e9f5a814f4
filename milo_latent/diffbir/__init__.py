"""DiffBIR's parts: cleaners, IRControlNet, colour fixes."""
