"""Records kept, tabulated, compared and shown."""
