"""Text to tokens and back: vocabularies, chat templates, and the choice of the next token."""
