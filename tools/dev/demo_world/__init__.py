"""The generated little world behind the bundled demo."""
