"""Trained weights of other libraries, converted into a network's variables."""
