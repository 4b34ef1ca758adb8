"""The command line: one module for each command, the chat REPL, terminal input and output."""
