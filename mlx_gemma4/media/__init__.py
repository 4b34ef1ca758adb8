"""Pictures and sounds: from files or bytes to soft tokens, by the towers of an mmproj file."""
