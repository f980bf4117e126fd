"""Settings shared by every test: what runs offline, on one seed, with warnings as errors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants a hub starts its own and says so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
