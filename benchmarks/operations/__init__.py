"""Every public operation with operands of a user's sizes, to be compiled for absent chips."""
