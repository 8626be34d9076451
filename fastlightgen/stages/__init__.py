"""The stages: teacher (0), rank (1), prune (2), distill (3). Each returns losses; none steps, places or saves state."""
