"""Where lmms-eval looks for the tasks of a plugin. There are none; without this package it stops with a traceback."""
