"""Forward diffusions: one small file per process."""
