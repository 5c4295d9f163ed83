"""What to run where a GPU is at hand: right, then how fast, then why."""
