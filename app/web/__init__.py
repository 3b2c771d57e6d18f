"""Server-rendered pages that need no script."""
