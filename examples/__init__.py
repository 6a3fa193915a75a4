"""Programs that show the library at work, and the models and texts that the tests use."""
