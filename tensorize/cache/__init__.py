"""Analyses on disk."""
