"""Our networks against other people's: one module for each, used by tests."""
