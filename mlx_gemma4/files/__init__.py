"""Model files on disk or on a hub: GGUF files, Hugging Face repositories."""
