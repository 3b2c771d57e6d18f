"""The groups of the command line, one module each: they parse, call a function and print."""
