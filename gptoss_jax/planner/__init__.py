"""Plans for hardware that is not present: ahead-of-time compiled steps, the work they must do, and the report."""
