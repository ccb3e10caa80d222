"""Who is asking: profiles, what they ban, and the embeddings that stand for them."""
