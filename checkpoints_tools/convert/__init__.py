"""The converter: turns a Hugging Face checkpoint into a GRINQH checkpoint, decoder layer by decoder layer.

Read ``driver`` first: it runs the stages ``survey``, ``measure_layers``, ``place_thresholds``,
``refit_layers`` and ``train_gains`` in this order. ``options`` has the caller's choices, ``plan`` the
decisions that follow from them, and ``parts`` the list of leaves that each stage writes.
``grinqh_jax.checkpoint.Writer`` keeps the complete parts of an interrupted conversion, so the same command
resumes it.
"""
