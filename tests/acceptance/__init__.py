"""Programs written for SVI, with its constructor replaced."""
