"""Serving: requests answered in batches over HTTP."""
