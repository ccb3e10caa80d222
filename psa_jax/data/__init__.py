"""Preference data: SAGE on disk, the small world drawn here, shards and batches."""
