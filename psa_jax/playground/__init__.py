"""The page to play with: one prompt, several users side by side, served to this machine alone."""
