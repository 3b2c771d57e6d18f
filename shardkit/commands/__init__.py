"""The command groups of `shardkit`, one module each; `shardkit.cli` mounts them."""
