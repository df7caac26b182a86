"""Faults that would make the privacy claim false, each one a small change of the product that the suite must notice."""
