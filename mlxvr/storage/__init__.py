"""Files on disk: replaced whole, grown line by line, found by name."""
