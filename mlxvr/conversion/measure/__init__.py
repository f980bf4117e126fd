"""How far a converted model is from its source, and which precision each module needs."""
