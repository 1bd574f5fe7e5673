"""Local training: the base model that all clients share, and one client's turn on it."""
