"""Speed, faults and comparisons: each a command that writes its figures."""
