"""The commands, a file each: what the command line offers, in the order that `--help` lists it."""
