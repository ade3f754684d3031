"""Plan a model on wafers that you need not own: `python -m models plan`."""
