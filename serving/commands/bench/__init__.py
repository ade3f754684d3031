"""`python -m serving bench`: load a server with requests, and time its answers."""
