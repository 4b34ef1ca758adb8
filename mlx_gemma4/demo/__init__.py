"""The model that ships with the package: `gemma4-demo.gguf`, described in `MODEL_CARD.md`."""
