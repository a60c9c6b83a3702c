"""Curves to numbers and words: fits, growth exponents, verdicts, comparisons. No torch."""

from simlab.theory.laws import LAWS, Law

__all__ = ["LAWS", "Law"]
