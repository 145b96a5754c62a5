"""The server: a scheduler of many sequences on one engine, HTTP in front of it, and a page to chat on."""
