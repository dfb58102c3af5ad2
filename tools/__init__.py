"""Development tools: checkpoint conversion, training of the embedded model, and golden files for the tests."""
