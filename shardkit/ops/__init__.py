"""The DBA's commands as functions: each has a plan, and the command line only prints it."""
