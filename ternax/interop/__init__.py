"""Models of other programs, in and out: GGUF files and Hugging Face directories."""
