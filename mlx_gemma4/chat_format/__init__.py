"""Gemma's chat format, both ways: messages to prompts, replies to events."""
