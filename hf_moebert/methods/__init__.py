"""Methods: one folder each, with the same roles in every folder."""
