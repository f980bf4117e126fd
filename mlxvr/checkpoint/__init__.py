"""A checkpoint on disk or on the Hub, and what is known of it before anything is loaded."""
