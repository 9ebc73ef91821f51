"""One file per published adapter format."""
