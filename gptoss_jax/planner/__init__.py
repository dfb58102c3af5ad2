"""What a model needs of a machine that is not here: steps compiled for it, the work they must do, and the report."""
