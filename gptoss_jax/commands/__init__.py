"""What the commands share: flags, files, signals and printing."""
