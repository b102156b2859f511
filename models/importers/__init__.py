"""Weights of public implementations, in the names of our modules: one file per system."""
