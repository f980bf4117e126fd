"""Files to patches: decoding, sampling, resizing and patchifying, in numpy alone."""
