"""What is computed: the config, the weights, the forward pass and its key/value cache."""
