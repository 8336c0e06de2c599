"""The converter: a Hugging Face checkpoint becomes a GRINQH checkpoint, one decoder layer at a time."""
