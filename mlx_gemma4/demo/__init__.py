"""The model that ships with the package, its assistant and its eyes, described in `MODEL_CARD.md`."""
