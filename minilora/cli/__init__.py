"""One command a file: `flags` adds its arguments, `run` does it and returns an exit code, None for 0."""
