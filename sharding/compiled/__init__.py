"""Memory, collectives and execution time of compiled programs, also for devices that are not present."""
