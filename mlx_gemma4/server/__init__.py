"""The server: OpenAI's and Anthropic's HTTP interfaces over one loaded model, and a page to chat in a browser."""
