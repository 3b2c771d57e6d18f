"""What connects shardkit with other libraries; one module for each."""
