"""Forward processes."""
