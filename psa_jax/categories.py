"""The seven categories of content that a profile may ban."""

CATEGORIES = ("Harassment", "Hate", "Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence")
