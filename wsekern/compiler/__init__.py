"""Compile programs for accelerators, present or not, and read what the compiler made of them.

`compile` is the public function. It may import every other room of the library.
"""
