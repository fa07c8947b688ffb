"""Personal adapters for many users of one frozen language model, searched for and trained on Ray."""

__version__ = "0.1.0"
