"""Text to ids and back: tokenizers, and the chat formats of every family."""
