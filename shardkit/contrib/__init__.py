"""Adapters to other libraries, one module for each; nothing here is imported by shardkit."""
