"""The gpt-oss model: config, weights, forward pass and key/value cache."""
