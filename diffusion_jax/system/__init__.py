"""The lowest layer: files, processes, user errors and terminal output."""
