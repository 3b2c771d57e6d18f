"""shardkit: many logical shards on a few PostgreSQL servers, as an extension of SQLAlchemy."""
