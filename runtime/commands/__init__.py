"""The verbs of `python -m runtime`, one module each: its options, and one public function whose signature they are."""
