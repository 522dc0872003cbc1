"""Programs that answer one question each; README.md says which. Never collected by pytest."""
