"""GGUF files, converted to a Hugging Face folder."""
