"""The rows of the registry, by where the encoders come from."""
