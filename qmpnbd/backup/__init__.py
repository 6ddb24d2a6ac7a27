"""What backups stand on: points in time, read."""
