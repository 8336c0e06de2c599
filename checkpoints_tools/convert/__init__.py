"""The converter: turns a Hugging Face checkpoint into a GRINQH checkpoint, one decoder layer at a time.

Read ``driver`` first: it runs the stages ``survey``, ``measure_layers``, ``place_thresholds``,
``refit_layers`` and ``train_gains`` in this order. ``options`` holds the caller's choices, ``plan`` the
decisions that follow from them, and ``parts`` lists what each stage writes. ``grinqh_jax.checkpoint.Writer``
keeps the complete parts of an interrupted conversion, so the same command resumes it.
"""
