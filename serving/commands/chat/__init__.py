"""`python -m serving chat`: talk with a model in the terminal."""
