"""What is read and written: whole files or none, strict JSON, safetensors, the folder of a model."""
