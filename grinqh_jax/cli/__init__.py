"""The command line: one module a verb, and the flags, errors and progress bars that verbs share."""
