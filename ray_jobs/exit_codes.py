"""What `lectern` tells a scheduler."""

ALL_DELIVERED = 0
NOTHING_STARTED = 2
"""Settings, weights, folders or the manifest as a whole do not allow a start."""
NOT_ALL_DELIVERED = 3
"""Some lessons failed or could not begin; `results.csv` says which and why."""
INTERRUPTED = 130
"""SIGINT or SIGTERM; the next run goes on from what is in the store."""
