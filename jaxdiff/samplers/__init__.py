"""Samplers: each a `Step`, one file a method."""
