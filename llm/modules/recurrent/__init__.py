"""Mixers with a state of fixed size instead of a cache. core.py has the one recurrence and what each paper changes in it."""
