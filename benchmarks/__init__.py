"""One module a subject, each with its baseline in the same run; `make bench` runs them all."""
