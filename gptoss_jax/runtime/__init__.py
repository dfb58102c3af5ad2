"""How programs are compiled: the compile cache and XLA options."""
