"""One file for each family of models: its presets, and its config.json, read and written."""
