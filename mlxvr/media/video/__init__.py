"""Video files: which frames there are, which are wanted, and decoding those alone."""
