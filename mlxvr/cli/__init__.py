"""How the program talks with people: flags, settings, progress and plots."""
