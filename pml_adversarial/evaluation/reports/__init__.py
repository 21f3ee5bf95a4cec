"""What was found, with its uncertainty and its origin: as JSON, as text and as a page."""
