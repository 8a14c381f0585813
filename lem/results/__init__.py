"""Records kept, put into tables and shown."""
