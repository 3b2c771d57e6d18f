"""Runs the command line: `python -m shardkit`."""

from __future__ import annotations

from shardkit.cli import main

if __name__ == "__main__":
    main()
