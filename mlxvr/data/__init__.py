"""Questions about clips: rows, the public files that they come from, and reading what they show."""
