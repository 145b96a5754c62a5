"""Model cards, and converted files on the Hugging Face Hub."""
