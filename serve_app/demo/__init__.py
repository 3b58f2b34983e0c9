"""A language model small enough to make on the spot."""
