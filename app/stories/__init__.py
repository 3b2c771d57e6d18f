"""Stories: pictures that are there for a day."""
