"""What diffusers, transformers and peft call, and how a quantized model is saved and loaded."""
