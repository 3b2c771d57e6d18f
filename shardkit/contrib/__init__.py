"""Adapters to other libraries, each an optional extra; nothing here is imported by shardkit."""
