"""The built-in world: clips with captions, their exact codec, the reader that scores what a model makes of them."""
