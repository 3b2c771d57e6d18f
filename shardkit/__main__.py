"""`python -m shardkit` runs the command line."""

from shardkit.cli import main

main()
