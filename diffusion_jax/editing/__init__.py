"""Editing: measurements of a picture, and samplers that keep to them."""
