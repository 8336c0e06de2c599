"""The converter: turns a Hugging Face checkpoint into a GRINQH checkpoint, one decoder layer at a time."""
