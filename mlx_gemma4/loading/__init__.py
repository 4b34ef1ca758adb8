"""A file or folder to a `Model`."""
