"""Files on disk: replaced in one step, appended to line by line, found by name."""
