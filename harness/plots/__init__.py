"""Figures and tables from trees of records."""
