"""What is below everything: files, processes, mistakes, the terminal."""
