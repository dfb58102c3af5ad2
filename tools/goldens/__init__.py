"""Reference numbers from independent implementations, made in environments of their own."""
