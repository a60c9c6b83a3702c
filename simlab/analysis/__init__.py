"""Curves to numbers and words: fits, growth exponents, verdicts, comparisons. No torch."""
