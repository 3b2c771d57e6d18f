"""Backups of a whole cluster with PostgreSQL's own tools, and one logical shard as files."""
