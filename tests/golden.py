"""DiffBIR's golden tiny networks, for the tests that compare with what the official code computed."""
