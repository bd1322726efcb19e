"""Faces and identities: detection, alignment, embeddings, and the conditioning that carries a person."""
