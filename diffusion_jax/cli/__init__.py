"""Code shared by the binaries: groups of flags and how they are read."""
