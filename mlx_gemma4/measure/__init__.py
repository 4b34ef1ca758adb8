"""Speed and memory: `bench` and `inspect`."""
