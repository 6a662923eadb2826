"""A training run: its schedule, folder, snapshots, progress."""
