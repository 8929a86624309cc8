"""The chat page at ``/``: one HTML file with its style and script, and nothing from elsewhere."""
