"""Pictures on their way in, and side by side on their way out."""
