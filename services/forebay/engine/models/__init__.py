"""Forward passes: one file per model family."""
