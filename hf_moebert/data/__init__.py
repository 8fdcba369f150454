"""Data: labelled texts and tagged words, as the columns that models read."""
