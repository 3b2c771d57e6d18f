"""Photos that people keep for themselves."""
