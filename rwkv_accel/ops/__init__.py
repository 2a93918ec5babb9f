"""Numerical operators: the WKV-7 recurrence and the language-model loss. They depend on torch alone."""
