"""The Python API that runs requests on the engine."""
