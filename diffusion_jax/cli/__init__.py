"""What the binaries share: groups of flags and what they ask for."""
