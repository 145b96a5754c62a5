"""Models on the Hugging Face Hub: their names, and how they are fetched."""
