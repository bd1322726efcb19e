"""Picture stories: the script, its styles and passes, captions and comic pages."""
