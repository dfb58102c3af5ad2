"""Tokens in, tokens out: sampling settings, compiled steps, and the loop that runs requests through them."""
