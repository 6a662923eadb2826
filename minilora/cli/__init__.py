"""One command a file: a function `run`, whose signature is the command's arguments; it returns an exit code, None for 0."""
