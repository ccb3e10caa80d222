"""SAGE-mini, the small world of the demo and the embedded model: what is about it alone."""
