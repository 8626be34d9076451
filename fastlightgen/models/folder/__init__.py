"""Model folders on disk: weights, files, configurations, the original repositories' format."""
