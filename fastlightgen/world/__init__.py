"""The built-in world: rendered clips with captions, an exact codec, and a reader that scores generated clips."""
