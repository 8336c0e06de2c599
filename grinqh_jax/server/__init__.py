"""The HTTP server with OpenAI's protocol, in front of ``serving.engine.Engine``. Needs the extra ``serve``.

From the outside in: ``run`` listens and drains, ``protocol`` limits connections, ``app`` maps paths to
handlers, ``access`` checks hosts and API keys, ``body`` reads requests. ``chat``, ``completions``, ``models``
and ``tokens`` are the handlers, ``schema`` and ``unsupported`` the fields that they accept, ``errors`` the
shape of their errors. ``service`` runs answers on the engine within the ``limits``, ``streaming`` sends
them while the client stays connected, ``answer_parser`` finds reasoning and tool calls in them, and
``metrics`` counts. ``tool_choice`` says which functions an answer may call, and ``answer_rules`` writes the
grammar of answers that must fit a schema.
"""
