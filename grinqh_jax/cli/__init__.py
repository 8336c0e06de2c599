"""The command line: one module for each verb, and the code that verbs share.

Verbs: ``generate``, ``chat``, ``perplexity``, ``evaluate``, ``lm_eval``, ``benchmark``, ``serve``,
``bench_serve``, ``inspect``; ``convert`` is ``checkpoints_tools.convert.command``. Shared: ``command``
(errors and exit codes), ``flags``, ``generation``, ``progress``, ``results``, ``text_input``.
``grinqh_jax.__main__`` maps each verb to its module.
"""
