"""What keeps a run alive, and nothing about the method: set-up, optimizer, checkpoints, the guard, logs."""
