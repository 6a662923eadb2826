"""Ways to fine-tune beside plain LoRA, a file each; table.py says what a file holds."""
