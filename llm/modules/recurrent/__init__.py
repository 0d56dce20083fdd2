"""Mixers with a state of fixed size instead of a cache. core.py has the recurrence and what each paper changes."""
