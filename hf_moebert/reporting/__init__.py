"""Reporting: tables, pictures, model cards, and publishing on the Hub."""
