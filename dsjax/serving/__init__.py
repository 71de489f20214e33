"""The server: an engine that other people's clients can talk to over HTTP."""
