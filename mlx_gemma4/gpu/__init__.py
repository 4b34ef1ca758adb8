"""Metal text to launches on a GPU. Knows no operation and no model."""
