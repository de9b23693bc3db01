"""Other forms of a training state: torch's, DeepSpeed's, safetensors, and the way between them."""
