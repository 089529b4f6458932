"""Figures, exports and model cards, made from the numbers of a run."""
