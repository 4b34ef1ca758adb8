"""Constraints on replies: JSON Schema, regular expressions, grammars, tool calls."""
