"""What this machine is, whether it computes what it should, and how fast: for the person at it, and for a report."""
